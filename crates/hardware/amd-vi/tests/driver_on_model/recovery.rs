//! What goes wrong, and what the driver makes of it.

use lychgate_amd_vi::model;
use lychgate_amd_vi::spec::Efr;
use lychgate_iommu::{AttachError, Domain, Driver, FaultReason, MapError};
use lychgate_model::Policy;
use lychgate_types::Iova;

use crate::bench::{ALIAS, Bench, DEVICE, IOMMU_MSI, OTHER, POLICIES, RW, frames};

#[test]
fn an_invalidation_that_was_refused_still_happens() {
    for policy in POLICIES {
        for ia_sup in [true, false] {
            let efr = Efr::default().with_hats(2).with_ia_sup(ia_sup);
            let bench = Bench::with(model::Config { efr, policy, ..model::Config::default() });
            let domain = bench.paging();
            bench.attach_paging(DEVICE, &domain);
            for round in 1..=2 {
                domain.map(Iova::new(0x1000), &frames(0x9000, 0x1000), RW).unwrap();
                assert_eq!(bench.read(DEVICE, 0x1000), Some(0x9000));
                bench.meddler.spoil(1);
                assert_eq!(domain.unmap(Iova::new(0x1000), 0x1000), 0x1000);
                assert_eq!(bench.read(DEVICE, 0x1000), None);
                assert_eq!(bench.driver.command_queue_restarts(), round);
            }
            assert!(!bench.driver.stalled());
        }
    }
}

#[test]
fn a_change_of_domains_survives_refused_commands() {
    for policy in POLICIES {
        let bench = Bench::new(policy);
        let (one, two) = (bench.paging(), bench.paging());
        one.map(Iova::new(0x1000), &frames(0x9000, 0x1000), RW).unwrap();
        two.map(Iova::new(0x1000), &frames(0xa000, 0x1000), RW).unwrap();
        bench.attach_paging(DEVICE, &one);
        assert_eq!(bench.read(ALIAS, 0x1000), Some(0x9000));
        bench.meddler.spoil(2);
        bench.attach_paging(DEVICE, &two);
        for requester in [DEVICE, ALIAS] {
            assert_eq!(bench.read(requester, 0x1000), Some(0xa000));
        }
    }
}

#[test]
fn hardware_that_refuses_everything_is_given_up() {
    let bench = Bench::new(Policy::Adversarial);
    let domain = bench.paging();
    bench.attach_paging(DEVICE, &domain);
    domain.map(Iova::new(0x1000), &frames(0x9000, 0x1000), RW).unwrap();
    assert_eq!(bench.read(DEVICE, 0x1000), Some(0x9000));
    bench.meddler.spoil(usize::MAX);
    assert_eq!(domain.unmap(Iova::new(0x1000), 0x1000), 0);
    assert!(bench.driver.stalled());
    let refused = domain.map(Iova::new(0x2000), &frames(0x9000, 0x1000), RW);
    assert_eq!(refused, Err(MapError::Hardware));
}

#[test]
fn an_overflow_of_the_event_log_is_told_and_survived() {
    for policy in POLICIES {
        let bench = Bench::new(policy);
        bench.attach_paging(DEVICE, &bench.paging());
        for round in 1..=3 {
            for page in 0..600 {
                assert_eq!(bench.read(DEVICE, page << 12), None);
            }
            while bench.driver.handle_interrupt() {}
            let faults = bench.sink.take();
            assert_eq!(faults.len(), 255, "the log has 256 entries, one of them free");
            for (fault, page) in faults.iter().zip(0..) {
                assert_eq!(fault.iova, Iova::new(page << 12));
                assert_eq!(fault.reason, FaultReason::NotPresent);
            }
            assert_eq!(*bench.sink.lost.lock().unwrap(), round);
        }
        // And a log that is served in time loses nothing.
        for page in 0..600_u64 {
            assert_eq!(bench.write(ALIAS, page << 12), None);
            if page % 100 == 0 {
                bench.driver.handle_interrupt();
            }
        }
        bench.driver.handle_interrupt();
        let faults = bench.sink.take();
        assert_eq!(faults.len(), 600);
        assert!(faults.iter().all(|fault| fault.requester == ALIAS && fault.write));
        assert_eq!(*bench.sink.lost.lock().unwrap(), 3);
    }
}

#[test]
fn a_fault_interrupts_once_until_it_was_served() {
    let bench = Bench::new(Policy::Plain);
    let take = || std::mem::take(&mut *bench.interrupts.lock().unwrap());
    assert_eq!(take(), []);
    for page in 0..3 {
        assert_eq!(bench.read(DEVICE, page << 12), None);
    }
    assert_eq!(take(), [IOMMU_MSI]);
    assert!(!bench.driver.handle_interrupt());
    assert_eq!(bench.sink.take().len(), 3);
    assert_eq!(bench.read(DEVICE, 0x1000), None);
    assert_eq!(take(), [IOMMU_MSI]);
    assert!(!bench.driver.handle_interrupt());
    assert!(!bench.driver.handle_interrupt());
    assert_eq!(bench.sink.take().len(), 1);
    assert_eq!(take(), []);
}

#[test]
fn no_memory_for_a_larger_table_leaves_the_smaller_one_in_use() {
    let bench = Bench::new(Policy::Adversarial);
    let domain = bench.paging();
    bench.attach_paging(DEVICE, &domain);
    domain.map(Iova::new(0x1000), &frames(0x9000, 0x1000), RW).unwrap();
    let far = |bench: &Bench, allocations| {
        bench.memory.fail_after(allocations);
        domain.map(Iova::new(1 << 60), &frames(0xa000, 0x1000), RW)
    };
    // A larger root takes three tables at once; what was made stays for the next attempt.
    for allocations in [0, 1, 2, 3, 0, 1] {
        assert_eq!(far(&bench, allocations), Err(MapError::OutOfMemory), "{allocations}");
        assert_eq!(bench.read(DEVICE, 0x1000), Some(0x9000));
        assert_eq!(bench.read(DEVICE, 1 << 60), None);
    }
    assert_eq!(far(&bench, usize::MAX), Ok(()));
    assert_eq!(bench.read(DEVICE, 1 << 60), Some(0xa000));
}

#[test]
fn a_refused_attachment_leaves_the_device_where_it_was() {
    let [bench, foreign] = [Policy::Adversarial; 2].map(Bench::new);
    let domain = bench.paging();
    domain.map(Iova::new(0x1000), &frames(0x9000, 0x1000), RW).unwrap();
    bench.attach_paging(OTHER, &domain);
    let stranger = Domain::Paging(foreign.paging());
    let refused = bench.driver.attach(OTHER, &stranger, &Domain::Blocked);
    assert_eq!(refused, Err(AttachError::Incompatible));
    assert_eq!(bench.read(OTHER, 0x1000), Some(0x9000));
}
