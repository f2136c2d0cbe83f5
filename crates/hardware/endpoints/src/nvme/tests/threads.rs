//! A thread that serves, and others that reach the function meanwhile.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use lychgate_model::PciFunction;

use super::driver::*;
use crate::nvme::spec::nvm;

/// Stops the serving thread also when a test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn serve_until(driver: &Driver, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        driver.nvme.service();
    }
}

/// Fills queue 1 with commands that together take a while.
fn fill(driver: &mut Driver) {
    for i in 0..60 {
        let (prp1, prp2) = driver.prps(BUFFERS, 1 << 20);
        driver.push(1, Command::range(nvm::READ, i * 16, 2048).prps(prp1, prp2));
    }
    driver.ring(1);
}

#[test]
fn registers_answer_while_commands_run() {
    let mut driver = Driver::ready(8 << 20);
    fill(&mut driver);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let _stop = Stop(&stop);
        scope.spawn(|| serve_until(&driver, &stop));
        for _ in 0..200 {
            assert_eq!(driver.read32(CSTS), 1);
            let mut id = [0; 4];
            driver.nvme.config_read(0, &mut id);
            assert_eq!(id, [0x36, 0x1b, 0x10, 0x00]);
        }
    });
    driver.run();
    for _ in 0..60 {
        assert_eq!(driver.reap(1).map(|done| done.status), Some(0));
    }
}

#[test]
fn once_reset_returns_nothing_of_the_life_before_moves() {
    for _ in 0..20 {
        let mut driver = Driver::ready(8 << 20);
        fill(&mut driver);
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let _stop = Stop(&stop);
            scope.spawn(|| serve_until(&driver, &stop));
            while driver.host.peek(driver.cqs[1].base + 14, 1)[0] & 1 == 0 {
                thread::yield_now();
            }
            driver.nvme.reset();
            driver.host.record();
            driver.nvme.config_write(4, &[6, 0]);
            for _ in 0..100 {
                thread::yield_now();
            }
            assert_eq!(driver.host.recorded(), []);
        });
    }
}
