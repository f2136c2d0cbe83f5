//! What a device reaches, from before it is probed until after it is released.

use std::sync::Arc;

use lychgate_amd_vi::model;
use lychgate_amd_vi::spec::Efr;
use lychgate_iommu::{Domain, Driver, FaultReason, PagingDomain};
use lychgate_model::Access;
use lychgate_types::{Iova, PhysAddr, PhysRun, Prot, RequesterId};

use crate::bench::{ALIAS, Bench, DEVICE, OTHER, POLICIES, RW, frames};

fn each_policy(test: impl Fn(&Bench)) {
    for policy in POLICIES {
        test(&Bench::new(policy));
    }
}

fn map(domain: &Arc<dyn PagingDomain>, iova: u64, phys: u64, len: u64) {
    domain.map(Iova::new(iova), &frames(phys, len), RW).unwrap();
}

fn unmap(domain: &Arc<dyn PagingDomain>, iova: u64, len: u64) {
    assert_eq!(domain.unmap(Iova::new(iova), len), len);
}

#[test]
fn nothing_passes_before_it_is_attached() {
    each_policy(|bench| {
        for requester in [DEVICE, ALIAS, OTHER, RequesterId::new(7), RequesterId::new(0x8000)] {
            assert_eq!(bench.read(requester, 0x1000), None, "{requester}");
        }
        bench.driver.handle_interrupt();
        let faults = bench.sink.take();
        assert_eq!(faults.len(), 5);
        assert!(faults.iter().all(|fault| fault.reason == FaultReason::Blocked), "{faults:?}");
        assert_eq!(faults[0].requester, DEVICE);
        assert_eq!(faults[0].iova, Iova::new(0x1000));
    });
}

#[test]
fn identity_passes_everything_and_blocked_nothing() {
    each_policy(|bench| {
        bench.attach(DEVICE, &Domain::Identity);
        for requester in [DEVICE, ALIAS] {
            assert_eq!(bench.read(requester, 0x1_2345_6780), Some(0x1_2345_6780));
            assert_eq!(bench.write(requester, 0x1000), Some(0x1000));
        }
        bench.attach(DEVICE, &Domain::Blocked);
        for requester in [DEVICE, ALIAS] {
            assert_eq!(bench.read(requester, 0x1_2345_6780), None);
            assert_eq!(bench.write(requester, 0x1000), None);
        }
    });
}

#[test]
fn a_mapping_of_any_size_is_there_at_once_and_gone_at_once() {
    each_policy(|bench| {
        let domain = bench.paging();
        bench.attach_paging(DEVICE, &domain);
        for shift in 12..=38 {
            let (size, at) = (1_u64 << shift, 1_u64 << shift);
            let phys = 1_u64 << 40 | 1 << shift;
            assert_eq!(bench.read(DEVICE, at), None);
            map(&domain, at, phys, size);
            let last = size - 8;
            for offset in [0, size / 2, last] {
                assert_eq!(bench.read(DEVICE, at + offset), Some(phys + offset), "2^{shift}");
                assert_eq!(bench.write(ALIAS, at + offset), Some(phys + offset));
            }
            assert_eq!(bench.read(DEVICE, at + size), None);
            unmap(&domain, at, size);
            for offset in [0, size / 2, last] {
                assert_eq!(bench.read(DEVICE, at + offset), None, "2^{shift}");
            }
        }
    });
}

#[test]
fn pages_that_share_a_table_live_and_die_alone() {
    each_policy(|bench| {
        let domain = bench.paging();
        bench.attach_paging(DEVICE, &domain);
        for page in 0..8 {
            map(&domain, page << 12, 0x10_0000 + (page << 13), 0x1000);
            assert_eq!(bench.read(DEVICE, page << 12), Some(0x10_0000 + (page << 13)));
        }
        unmap(&domain, 0x3000, 0x2000);
        for page in 0..8 {
            let there = (page != 3 && page != 4).then_some(0x10_0000 + (page << 13));
            assert_eq!(bench.read(DEVICE, page << 12), there);
        }
    });
}

#[test]
fn a_table_that_was_freed_is_not_walked_again() {
    each_policy(|bench| {
        let domain = bench.paging();
        bench.attach_paging(DEVICE, &domain);
        let scattered: Vec<PhysRun> =
            (0..512).map(|page| frames(0x100_0000 + page * 0x2000, 0x1000)[0]).collect();
        for round in 0..3 {
            domain.map(Iova::new(0x20_0000), &scattered, RW).unwrap();
            for page in 0..512 {
                let reached = bench.read(DEVICE, 0x20_0000 + page * 0x1000);
                assert_eq!(reached, Some(0x100_0000 + page * 0x2000), "round {round}");
            }
            unmap(&domain, 0x20_0000, 0x20_0000);
            // A large leaf where the table was, and then another table.
            map(&domain, 0x20_0000, 0x4000_0000, 0x20_0000);
            assert_eq!(bench.read(DEVICE, 0x20_1000), Some(0x4000_1000));
            unmap(&domain, 0x20_0000, 0x20_0000);
            for page in 0..512 {
                assert_eq!(bench.read(DEVICE, 0x20_0000 + page * 0x1000), None);
            }
        }
    });
}

#[test]
fn permissions_hold_and_can_change() {
    each_policy(|bench| {
        let domain = bench.paging();
        bench.attach_paging(DEVICE, &domain);
        let at = Iova::new(0x4000);
        domain.map(at, &frames(0x9000, 0x1000), Prot::READ).unwrap();
        assert_eq!(bench.read(DEVICE, 0x4000), Some(0x9000));
        assert_eq!(bench.write(DEVICE, 0x4008), None);
        unmap(&domain, 0x4000, 0x1000);
        domain.map(at, &frames(0x9000, 0x1000), Prot::WRITE).unwrap();
        assert_eq!(bench.read(DEVICE, 0x4000), None);
        assert_eq!(bench.write(DEVICE, 0x4000), Some(0x9000));
        assert_eq!(bench.read(DEVICE, 0x7000), None);
        bench.driver.handle_interrupt();
        let faults: Vec<_> =
            bench.sink.take().iter().map(|f| (f.iova, f.write, f.reason)).collect();
        assert_eq!(
            faults,
            [
                (Iova::new(0x4008), true, FaultReason::Permission),
                (at, false, FaultReason::Permission),
                (Iova::new(0x7000), false, FaultReason::NotPresent),
            ]
        );
    });
}

#[test]
fn a_transfer_over_many_leaves_reaches_each_and_stops_at_a_hole() {
    each_policy(|bench| {
        let domain = bench.paging();
        bench.attach_paging(DEVICE, &domain);
        map(&domain, 0x1000, 0x9000, 0x1000);
        map(&domain, 0x2000, 0x20000, 0x2000);
        let runs = bench.dma(DEVICE, 0x1800, 0x2000, Access::Read).unwrap();
        let bytes = |start: u64, len: u64| start..start + len;
        let reached = runs.iter().flat_map(|run| bytes(run.start.get(), run.len));
        assert!(reached.eq(bytes(0x9800, 0x800).chain(bytes(0x20000, 0x1800))));
        let stopped = bench.dma(DEVICE, 0x1800, 0x4000, Access::Read);
        assert_eq!(stopped, Err(Iova::new(0x4000)));
    });
}

#[test]
fn domains_do_not_see_each_other() {
    each_policy(|bench| {
        let (one, two) = (bench.paging(), bench.paging());
        bench.attach_paging(DEVICE, &one);
        bench.attach_paging(OTHER, &two);
        map(&one, 0x1000, 0x9000, 0x1000);
        assert_eq!(bench.read(DEVICE, 0x1000), Some(0x9000));
        assert_eq!(bench.read(OTHER, 0x1000), None);
        map(&two, 0x1000, 0xa000, 0x1000);
        assert_eq!(bench.read(OTHER, 0x1000), Some(0xa000));
        assert_eq!(bench.read(DEVICE, 0x1000), Some(0x9000));
    });
}

#[test]
fn a_device_that_changes_domains_sees_only_the_new_one() {
    each_policy(|bench| {
        let (one, two) = (bench.paging(), bench.paging());
        map(&one, 0x1000, 0x9000, 0x1000);
        map(&one, 0x5000, 0xb000, 0x1000);
        map(&two, 0x1000, 0xa000, 0x1000);
        bench.attach_paging(OTHER, &one);
        for _ in 0..3 {
            bench.attach_paging(DEVICE, &one);
            for requester in [DEVICE, ALIAS] {
                assert_eq!(bench.read(requester, 0x1000), Some(0x9000));
                assert_eq!(bench.read(requester, 0x5000), Some(0xb000));
            }
            bench.attach_paging(DEVICE, &two);
            for requester in [DEVICE, ALIAS] {
                assert_eq!(bench.read(requester, 0x1000), Some(0xa000));
                assert_eq!(bench.read(requester, 0x5000), None);
            }
            bench.attach(DEVICE, &Domain::Identity);
            assert_eq!(bench.read(ALIAS, 0x1000), Some(0x1000));
        }
        assert_eq!(bench.read(OTHER, 0x1000), Some(0x9000));
    });
}

#[test]
fn what_two_devices_have_cached_goes_for_both() {
    each_policy(|bench| {
        let domain = bench.paging();
        bench.attach_paging(DEVICE, &domain);
        bench.attach_paging(OTHER, &domain);
        map(&domain, 0x1000, 0x9000, 0x1000);
        assert_eq!(bench.read(DEVICE, 0x1000), Some(0x9000));
        assert_eq!(bench.read(OTHER, 0x1000), Some(0x9000));
        bench.attach(DEVICE, &Domain::Blocked);
        unmap(&domain, 0x1000, 0x1000);
        assert_eq!(bench.read(OTHER, 0x1000), None);
        assert_eq!(bench.read(DEVICE, 0x1000), None);
    });
}

#[test]
fn what_changes_while_no_device_is_attached_is_seen_by_the_next_one() {
    each_policy(|bench| {
        let domain = bench.paging();
        bench.attach_paging(DEVICE, &domain);
        map(&domain, 0x1000, 0x9000, 0x1000);
        map(&domain, 0x2000, 0xa000, 0x1000);
        assert_eq!(bench.read(ALIAS, 0x1000), Some(0x9000));
        bench.attach(DEVICE, &Domain::Blocked);
        unmap(&domain, 0x1000, 0x1000);
        bench.attach_paging(DEVICE, &domain);
        assert_eq!(bench.read(DEVICE, 0x1000), None);
        assert_eq!(bench.read(ALIAS, 0x1000), None);
        assert_eq!(bench.read(ALIAS, 0x2000), Some(0xa000));
    });
}

#[test]
fn a_table_grows_under_its_devices() {
    each_policy(|bench| {
        let domain = bench.paging();
        bench.attach_paging(DEVICE, &domain);
        map(&domain, 0x1000, 0x9000, 0x1000);
        let mut mapped = vec![(0x1000, 0x9000)];
        let far = [1 << 39, 1 << 47, 1 << 48, 1 << 57, 1 << 63, u64::MAX - 0xfff];
        for (count, at) in (0x100..).zip(far) {
            for requester in [DEVICE, ALIAS] {
                assert_eq!(bench.read(requester, at), None);
            }
            map(&domain, at, count << 12, 0x1000);
            mapped.push((at, count << 12));
            for requester in [ALIAS, DEVICE] {
                for &(iova, phys) in &mapped {
                    assert_eq!(bench.read(requester, iova), Some(phys), "{iova:#x}");
                }
            }
        }
        // A device that comes later gets the whole table, and what goes is gone everywhere.
        bench.attach_paging(OTHER, &domain);
        for &(iova, phys) in &mapped {
            assert_eq!(bench.read(OTHER, iova), Some(phys));
        }
        for &(iova, _) in &mapped {
            unmap(&domain, iova, 0x1000);
            assert_eq!(bench.read(OTHER, iova), None);
            assert_eq!(bench.read(ALIAS, iova), None);
        }
    });
}

#[test]
fn iommus_with_fewer_levels_have_smaller_apertures() {
    for (hats, bits) in [(0, 48), (1, 57), (2, 64)] {
        let efr = Efr::default().with_ia_sup(true).with_hats(hats);
        let bench = Bench::with(model::Config { efr, ..model::Config::default() });
        let domain = bench.paging();
        bench.attach_paging(DEVICE, &domain);
        let last = domain.geometry().last.get();
        assert_eq!(last, u64::MAX >> (64 - bits));
        map(&domain, last - 0xfff, 0x9000, 0x1000);
        assert_eq!(bench.read(DEVICE, last - 7), Some(0x9ff8));
    }
}

#[test]
fn a_domain_id_comes_back_without_its_past() {
    each_policy(|bench| {
        bench.attach(OTHER, &Domain::Identity);
        // More domains than there are ids, all with the same address in use.
        for round in 0..70_000_u64 {
            let domain = bench.paging();
            if round % 1000 == 0 || round > 69_000 {
                bench.attach_paging(DEVICE, &domain);
                assert_eq!(bench.read(DEVICE, 0x1000), None, "round {round}");
                map(&domain, 0x1000, 0x10_0000 + round * 0x1000, 0x1000);
                assert_eq!(bench.read(DEVICE, 0x1000), Some(0x10_0000 + round * 0x1000));
                bench.attach(DEVICE, &Domain::Blocked);
            }
        }
    });
}

#[test]
fn a_released_device_reaches_nothing() {
    each_policy(|bench| {
        let domain = bench.paging();
        map(&domain, 0x1000, 0x9000, 0x1000);
        bench.attach_paging(DEVICE, &domain);
        assert_eq!(bench.read(ALIAS, 0x1000), Some(0x9000));
        bench.driver.release(DEVICE);
        for requester in [DEVICE, ALIAS] {
            assert_eq!(bench.read(requester, 0x1000), None);
        }
        bench.driver.probe(DEVICE, &[ALIAS]).unwrap();
        assert_eq!(bench.read(DEVICE, 0x1000), None);
        bench.attach_paging(DEVICE, &domain);
        assert_eq!(bench.read(DEVICE, 0x1000), Some(0x9000));
        assert_eq!(domain.iova_to_phys(Iova::new(0x1008)), Some(PhysAddr::new(0x9008)));
    });
}

#[test]
fn after_the_driver_devices_stay_blocked() {
    for policy in POLICIES {
        let bench = Bench::new(policy);
        let domain = bench.paging();
        map(&domain, 0x1000, 0x9000, 0x1000);
        bench.attach_paging(DEVICE, &domain);
        bench.attach(OTHER, &Domain::Identity);
        assert_eq!(bench.read(DEVICE, 0x1000), Some(0x9000));
        let Bench { port, memory, driver, .. } = bench;
        drop(driver);
        drop(domain);
        assert_eq!(memory.live(), 1, "the device table");
        for requester in [DEVICE, ALIAS, OTHER] {
            let reached = crate::bench::dma(&port, requester, 0x1000, 8, Access::Read);
            assert_eq!(reached, Err(Iova::new(0x1000)));
        }
    }
}
