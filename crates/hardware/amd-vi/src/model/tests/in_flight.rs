use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Weak, mpsc};
use std::thread;
use std::time::Duration;

use super::*;
use crate::spec::size::Block;

#[test]
fn an_invalidation_completes_only_after_accesses_that_could_use_what_it_removes() {
    let rig = Rig::new();
    let root = rig.table();
    rig.set_entry(DEVICE, translated(root, 3));
    rig.map(root, 3, 0x1000, page(rig.wait));
    let released = AtomicBool::new(false);
    let (entered, in_access) = mpsc::channel();
    thread::scope(|scope| {
        // Inside, so that a failed assertion lets the access go and the test end.
        let (release, go_on) = mpsc::channel();
        let (rig, released) = (&rig, &released);
        scope.spawn(move || {
            let request = Translation {
                requester: DEVICE,
                pasid: None,
                start: Iova::new(0x1000),
                len: 8,
                access: Access::Write,
            };
            rig.iommu
                .with_translation(&[request], &mut |_| {
                    entered.send(()).unwrap();
                    go_on.recv().unwrap();
                    released.store(true, Ordering::SeqCst);
                    Ok(())
                })
                .unwrap();
        });
        in_access.recv().unwrap();
        let flusher = scope.spawn(move || {
            rig.run(&[Command::invalidate_iommu_pages(7, Block::ALL, true)]);
            assert!(released.load(Ordering::SeqCst), "completed while the access was on its way");
        });
        // A wrong model completes at once; a right one cannot before the access goes on.
        thread::sleep(Duration::from_millis(50));
        assert_eq!(rig.load(rig.wait), 0);
        assert!(!flusher.is_finished());
        release.send(()).unwrap();
        flusher.join().unwrap();
    });
    assert_eq!(rig.load(rig.wait), 1);
}

#[test]
fn an_interrupt_handler_may_use_the_registers_and_commands() {
    let pages = Arc::new(HeapPages::new());
    let (log, commands, wait) =
        (pages.alloc(4096).unwrap(), pages.alloc(4096).unwrap(), pages.alloc(4096).unwrap());
    let handled = Arc::new(Mutex::new(Vec::new()));
    let iommu = Arc::new_cyclic(|weak: &Weak<AmdVi>| {
        let (weak, handled, memory) = (weak.clone(), Arc::clone(&handled), Arc::clone(&pages));
        AmdVi::new(
            Config::default(),
            Arc::clone(&pages) as Arc<dyn Memory>,
            Arc::new(move |_| {
                let iommu = weak.upgrade().unwrap();
                iommu.write64(regs::STATUS, 7);
                handled.lock().unwrap().push(iommu.read64(regs::EVENT_TAIL));
                let command = Command::completion_wait(wait, 5, false);
                memory.store_u64(commands, command.0[0]).unwrap();
                memory.store_u64(commands.wrapping_add(8), command.0[1]).unwrap();
                iommu.write64(regs::COMMAND_TAIL, 16);
            }),
        )
    });
    function::set_up_msi(&iommu, 0xfee0_0000, 1);
    let ring = RingBase::default().with_ring_len(8);
    iommu.write64(regs::EVENT_LOG_BASE, ring.with_base(log).0[0]);
    iommu.write64(regs::COMMAND_BUFFER_BASE, ring.with_base(commands).0[0]);
    iommu.write64(regs::CONTROL, enabled().0[0]);
    let request = Translation {
        requester: DEVICE,
        pasid: None,
        start: Iova::new(0),
        len: 1,
        access: Access::Read,
    };
    iommu.with_translation(&[request], &mut |_| Ok(())).unwrap_err();
    assert_eq!(*handled.lock().unwrap(), [16]);
    assert_eq!(pages.load_u64(wait), Ok(5));
}

/// Pages are unmapped and their memory reused while a device goes on using them: no access may
/// see memory that was reused before the wait for the invalidation was over.
#[test]
fn reuse_after_the_wait_is_never_seen_by_an_access() {
    for policy in [Policy::Plain, Policy::Adversarial, Policy::EvictRandom(9)] {
        let rig = Rig::with(Config { policy, ..Config::default() });
        let root = rig.table();
        rig.set_entry(DEVICE, translated(root, 3));
        let leaf = rig.entry_of(root, 3, 1, 0x1000);
        let (old, new) = (rig.table(), rig.table());
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let (rig, stop) = (&rig, &stop);
            for _ in 0..2 {
                scope.spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        let request = Translation {
                            requester: DEVICE,
                            pasid: None,
                            start: Iova::new(0x1000),
                            len: 8,
                            access: Access::Read,
                        };
                        let _ = rig.iommu.with_translation(&[request], &mut |runs| {
                            let before = rig.pages.load_u64(runs[0].start)?;
                            thread::yield_now();
                            assert_eq!((before, rig.pages.load_u64(runs[0].start)?), (0, 0));
                            Ok(())
                        });
                    }
                });
            }
            for round in 0..300 {
                let here = if round % 2 == 0 { old } else { new };
                rig.store(here, 0);
                rig.store(leaf, page(here).0[0]);
                thread::yield_now();
                rig.store(leaf, 0);
                rig.run(&[Command::invalidate_iommu_pages(
                    7,
                    Block { start: 0x1000, order: 12 },
                    false,
                )]);
                rig.store(here, 0xdead);
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}
