use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::*;
use crate::testing::{Act, Host};

/// A clock that stands until it is told to move.
struct Manual {
    start: Instant,
    millis: AtomicU64,
}

impl Clock for Manual {
    fn now(&self) -> Instant {
        self.start + Duration::from_millis(self.millis.load(Ordering::Relaxed))
    }
}

struct Bench {
    host: Arc<Host>,
    clock: Arc<Manual>,
    edu: Edu,
}

const DMA_TO_DEVICE: u64 = 1;
const DMA_TO_HOST: u64 = 3;

impl Bench {
    fn new(dma_mask: u64) -> Self {
        let host = Arc::new(Host::new(1 << 20));
        let clock = Arc::new(Manual { start: Instant::now(), millis: AtomicU64::new(0) });
        let config = EduConfig { dma_mask, clock: clock.clone(), ..EduConfig::default() };
        let edu = Edu::new(config, host.clone());
        edu.config_write(4, &[6, 0]);
        Self { host, clock, edu }
    }

    fn read(&self, at: u64) -> u32 {
        let mut bytes = [0; 4];
        self.edu.bar_read(0, at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn write(&self, at: u64, value: u32) {
        self.edu.bar_write(0, at, &value.to_le_bytes());
    }

    fn write64(&self, at: u64, value: u64) {
        self.edu.bar_write(0, at, &value.to_le_bytes());
    }

    fn command(&self, source: u64, destination: u64, count: u64, command: u64) {
        self.write64(0x80, source);
        self.write64(0x88, destination);
        self.write64(0x90, count);
        self.write64(0x98, command);
    }

    fn wait(&self) {
        self.clock.millis.fetch_add(100, Ordering::Relaxed);
        while self.edu.service() == Service::Busy {}
    }

    fn dma(&self, source: u64, destination: u64, count: u64, command: u64) {
        self.command(source, destination, count, command);
        self.wait();
        assert_eq!(self.read(0x98) & 1, 0);
    }

    fn enable_msi(&self) {
        self.edu.config_write(0x44, &0xfee0_1000_u32.to_le_bytes());
        self.edu.config_write(0x4c, &[0x33, 0]);
        self.edu.config_write(0x42, &[1, 0]);
    }
}

#[test]
fn identity_and_liveness_read_as_qemus_do() {
    let bench = Bench::new(!0);
    let mut ids = [0; 12];
    bench.edu.config_read(0, &mut ids);
    assert_eq!(ids[..4], [0x34, 0x12, 0xe8, 0x11]);
    assert_eq!(ids[8..], [0x10, 0, 0xff, 0]);
    assert_eq!(bench.read(0), 0x0100_00ed);
    bench.write(0, 5);
    assert_eq!(bench.read(0), 0x0100_00ed);
    bench.write(4, 0x1234_5678);
    assert_eq!(bench.read(4), !0x1234_5678);
}

#[test]
fn access_widths_below_80_are_four_bytes_and_above_four_or_eight() {
    let bench = Bench::new(!0);
    let mut bytes = [0; 8];
    bench.edu.bar_read(0, 0, &mut bytes);
    assert_eq!(bytes, [0xff; 8]);
    bench.edu.bar_read(0, 0, &mut bytes[..2]);
    assert_eq!(bytes, [0xff; 8]);
    bench.edu.bar_write(0, 4, &[1; 2]);
    assert_eq!(bench.read(4), 0);
    bench.write64(0x80, 0x1_2345_6789);
    bench.edu.bar_read(0, 0x80, &mut bytes);
    assert_eq!(u64::from_le_bytes(bytes), 0x1_2345_6789);
    assert_eq!(bench.read(0x80), 0x2345_6789);
    assert_eq!(bench.read(0x30), !0);
    assert_eq!(bench.read(0x40000), !0, "the buffer is not in the BAR");
}

#[test]
fn a_factorial_is_busy_until_served_and_interrupts_if_asked() {
    let bench = Bench::new(!0);
    for (n, product) in [(0, 1), (1, 1), (5, 120), (13, 1_932_053_504), (34, 0), (u32::MAX, 0)] {
        bench.write(0x20, 0x80);
        bench.write(8, n);
        assert_eq!(bench.read(0x20), 0x81);
        bench.write(8, 7);
        while bench.edu.service() == Service::Busy {}
        assert_eq!((bench.read(0x20), bench.read(8)), (0x80, product), "{n}");
        assert_eq!(bench.read(0x24), 1);
        assert!(bench.host.intx_level());
        bench.write(0x64, 1);
        assert!(!bench.host.intx_level());
        bench.write(0x20, 0);
        bench.write(8, n);
        while bench.edu.service() == Service::Busy {}
        assert_eq!(bench.read(0x24), 0);
    }
}

#[test]
fn dma_runs_after_its_delay_and_moves_the_bytes_there_and_back() {
    let bench = Bench::new(!0);
    let bytes: Vec<u8> = (0..=255).cycle().take(4096).collect();
    bench.host.poke(0x1000, &bytes);
    bench.command(0x1000, 0x40000, 4096, DMA_TO_DEVICE);
    assert!(matches!(bench.edu.service(), Service::At(_)));
    assert_eq!(bench.read(0x98), 1);
    bench.write64(0x80, 0xdead);
    bench.clock.millis.fetch_add(99, Ordering::Relaxed);
    assert!(matches!(bench.edu.service(), Service::At(_)));
    bench.clock.millis.fetch_add(1, Ordering::Relaxed);
    assert_eq!(bench.edu.service(), Service::Busy);
    assert_eq!(bench.edu.service(), Service::Asleep);
    assert_eq!(bench.read(0x98), 0);
    bench.dma(0x40010, 0x3000, 0x20, DMA_TO_HOST);
    assert_eq!(bench.host.peek(0x3000, 0x21), [&bytes[0x10..0x30], &[0]].concat());
}

#[test]
fn a_command_without_the_run_bit_is_ignored() {
    let bench = Bench::new(!0);
    bench.command(0x1000, 0x40000, 16, 6);
    assert_eq!(bench.edu.service(), Service::Asleep);
    assert_eq!(bench.read(0x98), 0);
}

#[test]
fn transfers_outside_the_buffer_move_nothing() {
    let bench = Bench::new(!0);
    bench.host.record();
    for (device, count) in [
        (0x3ffff, 1),
        (0x40000, 4097),
        (0x40fff, 2),
        (0x41000, 1),
        (0x40000, u64::MAX),
        (u64::MAX, 1),
        (0x40000, 0),
    ] {
        bench.dma(device, 0x1000, count, DMA_TO_HOST);
        bench.dma(0x1000, device, count, DMA_TO_DEVICE);
    }
    assert_eq!(bench.host.recorded(), []);
}

#[test]
fn bus_addresses_are_masked_to_28_bits() {
    let bench = Bench::new((1 << 28) - 1);
    bench.host.poke(0x1000, &[7; 16]);
    bench.dma(0xf000_1000, 0x40000, 16, DMA_TO_DEVICE);
    bench.dma(0x40000, 0x5_0000_2000, 16, DMA_TO_HOST);
    assert_eq!(bench.host.peek(0x2000, 16), [7; 16]);
}

#[test]
fn an_aborted_transfer_ends_without_an_error_but_in_the_pci_status() {
    let bench = Bench::new(!0);
    bench.host.unmap(0x1000..0x2000);
    bench.dma(0x1000, 0x40000, 16, DMA_TO_DEVICE | 4);
    assert_eq!(bench.read(0x24), 0x100);
    let mut status = [0; 2];
    bench.edu.config_read(6, &mut status);
    assert_ne!(status[1] & 1 << 5, 0);
    bench.dma(0x40000, 0x3000, 16, DMA_TO_HOST);
    assert_eq!(bench.host.peek(0x3000, 16), [0; 16]);
}

#[test]
fn interrupts_are_messages_with_msi_and_a_level_without() {
    let bench = Bench::new(!0);
    bench.write(0x60, 0x10);
    assert!(bench.host.intx_level());
    bench.edu.config_write(5, &[4]);
    assert!(!bench.host.intx_level(), "Interrupt Disable");
    bench.edu.config_write(5, &[0]);
    assert!(bench.host.intx_level());
    bench.write(0x60, 1);
    bench.write(0x64, 0x10);
    assert!(bench.host.intx_level(), "bit 0 is still set");
    bench.write(0x64, 1);
    assert!(!bench.host.intx_level());

    bench.enable_msi();
    bench.write(0x60, 1);
    bench.write(0x60, 1);
    assert_eq!(bench.host.take_msis(), [(0xfee0_1000, 0x33); 2]);
    assert!(!bench.host.intx_level());
    bench.dma(0x40000, 0x1000, 4, DMA_TO_HOST | 4);
    assert_eq!(bench.host.take_msis(), [(0xfee0_1000, 0x33)]);
    assert_eq!(bench.read(0x24), 0x101);
}

#[test]
fn reset_stops_a_transfer_and_lowers_the_line() {
    let bench = Bench::new(!0);
    bench.write(0x60, 1);
    bench.command(0x40000, 0x1000, 16, DMA_TO_HOST | 4);
    bench.edu.reset();
    assert!(!bench.host.intx_level());
    bench.host.record();
    bench.wait();
    assert_eq!(bench.host.recorded(), []);
    bench.edu.config_write(4, &[6, 0]);
    assert_eq!([bench.read(0x24), bench.read(0x80), bench.read(0x98)], [0; 3]);
}

#[test]
fn without_bus_mastering_no_request_leaves() {
    let bench = Bench::new(!0);
    bench.enable_msi();
    bench.edu.config_write(4, &[2, 0]);
    bench.host.record();
    bench.dma(0x40000, 0x1000, 16, DMA_TO_HOST | 4);
    assert_eq!(bench.host.recorded(), Vec::<Act>::new());
    assert_eq!(bench.read(0x24), 0x100);
}

proptest! {
    #[test]
    fn no_sequence_of_accesses_panics(
        accesses in prop::collection::vec(
            (prop_oneof![(0_u64..0x28).prop_map(|n| n * 4), any::<u64>()], any::<u64>(), 0_usize..9),
            1..100,
        ),
    ) {
        let bench = Bench::new(!0);
        for (offset, value, len) in accesses {
            bench.edu.bar_write(0, offset, &value.to_le_bytes()[..len]);
            bench.edu.bar_read(0, offset, &mut [0; 8][..len]);
            bench.edu.config_write((offset & 0x1ff) as u16, &value.to_le_bytes()[..len / 2]);
            bench.wait();
        }
    }
}
