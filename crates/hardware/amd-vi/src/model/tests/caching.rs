use super::*;
use crate::spec::dte::HAD_ACCESS_DIRTY;
use crate::spec::size::Block;

const OLD: u64 = 0x1_0000;
const NEW: u64 = 0x2_0000;

fn page_of(at: u64) -> Block {
    Block { start: at & !0xfff, order: 12 }
}

fn flush(domain: u64, block: Block, pde: bool) -> Command {
    Command::invalidate_iommu_pages(u16::try_from(domain).unwrap(), block, pde)
}

/// A device whose page 0x1000 was mapped to `OLD`, used, and then remapped to `NEW`.
fn stale(rig: &Rig) -> PhysAddr {
    let root = rig.table();
    rig.set_entry(DEVICE, translated(root, 3));
    rig.map(root, 3, 0x1000, page(PhysAddr::new(OLD)));
    assert_eq!(rig.read_at(DEVICE, 0x1000), Ok(OLD));
    rig.map(root, 3, 0x1000, page(PhysAddr::new(NEW)));
    root
}

#[test]
fn a_translation_stays_until_its_page_is_invalidated() {
    for rig in [Rig::new(), Rig::adversarial()] {
        stale(&rig);
        assert_eq!(rig.read_at(DEVICE, 0x1000), Ok(OLD));
        rig.run(&[
            flush(DOMAIN, page_of(0x2000), true),
            flush(DOMAIN + 1, Block::ALL, true),
            Command::invalidate_devtab_entry(DEVICE),
            Command::invalidate_interrupt_table(DEVICE),
            flush(DOMAIN, page_of(0x1000), false).with_gn(true),
        ]);
        assert_eq!(rig.read_at(DEVICE, 0x1000), Ok(OLD), "none of these names the page");
        rig.run(&[flush(DOMAIN, page_of(0x1000), false)]);
        assert_eq!(rig.read_at(DEVICE, 0x1000), Ok(NEW));
    }
}

#[test]
fn every_block_around_the_page_drops_it() {
    for block in [Block { start: 0, order: 13 }, Block { start: 0, order: 30 }, Block::ALL] {
        let rig = Rig::adversarial();
        stale(&rig);
        rig.run(&[flush(DOMAIN, block, false)]);
        assert_eq!(rig.read_at(DEVICE, 0x1000), Ok(NEW), "{block:x?}");
    }
    let rig = Rig::adversarial();
    stale(&rig);
    rig.run(&[Command::invalidate_iommu_all()]);
    assert_eq!(rig.read_at(DEVICE, 0x1000), Ok(NEW));
}

#[test]
fn any_part_of_a_large_page_drops_the_whole() {
    let rig = Rig::adversarial();
    let root = rig.table();
    rig.set_entry(DEVICE, translated(root, 3));
    let slot = rig.entry_of(root, 3, 2, 0x20_0000);
    rig.store(slot, page(PhysAddr::new(0x4000_0000)).0[0]);
    assert_eq!(rig.read_at(DEVICE, 0x20_0000), Ok(0x4000_0000));
    rig.store(slot, 0);
    assert_eq!(rig.read_at(DEVICE, 0x3f_f000), Ok(0x401f_f000));
    rig.run(&[flush(DOMAIN, page_of(0x2a_a000), false)]);
    assert_eq!(rig.read_at(DEVICE, 0x3f_f000), Err(0x3f_f000));
}

#[test]
fn translations_are_shared_by_domain_id_whatever_the_tables() {
    let rig = Rig::adversarial();
    stale(&rig);
    let other_root = rig.table();
    rig.map(other_root, 4, 0x1000, page(PhysAddr::new(0x3_0000)));
    rig.set_entry(OTHER, translated(other_root, 4));
    assert_eq!(rig.read_at(OTHER, 0x1000), Ok(OLD), "the same DomainID hits the other's page");
    rig.set_entry(OTHER, translated(other_root, 4).with_domain_id(DOMAIN + 1));
    rig.run(&[Command::invalidate_devtab_entry(OTHER)]);
    assert_eq!(rig.read_at(OTHER, 0x1000), Ok(0x3_0000));
}

#[test]
fn a_device_entry_stays_until_it_is_invalidated() {
    let rig = Rig::adversarial();
    assert_eq!(rig.read_at(DEVICE, 0x1000), Ok(0x1000), "V = 0");
    let root = rig.table();
    rig.set_entry(DEVICE, translated(root, 3));
    assert_eq!(rig.read_at(DEVICE, 0x1000), Ok(0x1000), "cached V = 0 is pass-through");
    rig.run(&[Command::invalidate_devtab_entry(OTHER), flush(DOMAIN, Block::ALL, true)]);
    assert_eq!(rig.read_at(DEVICE, 0x1000), Ok(0x1000));
    rig.run(&[Command::invalidate_devtab_entry(DEVICE)]);
    assert_eq!(rig.read_at(DEVICE, 0x1000), Err(0x1000));
}

#[test]
fn not_present_is_never_cached() {
    let rig = Rig::adversarial();
    let root = rig.table();
    rig.set_entry(DEVICE, translated(root, 3));
    assert!(rig.read_at(DEVICE, 0x1000).is_err());
    rig.map(root, 3, 0x1000, page(PhysAddr::new(NEW)));
    assert_eq!(rig.read_at(DEVICE, 0x1000), Ok(NEW));
}

#[test]
fn more_permission_is_seen_only_after_an_invalidation() {
    let rig = Rig::adversarial();
    let root = rig.table();
    rig.set_entry(DEVICE, translated(root, 3));
    rig.map(root, 3, 0x1000, page(PhysAddr::new(OLD)).with_iw(false));
    rig.read_at(DEVICE, 0x1000).unwrap();
    rig.map(root, 3, 0x1000, page(PhysAddr::new(OLD)));
    assert!(rig.write_at(DEVICE, 0x1000).is_err());
    rig.run(&[flush(DOMAIN, page_of(0x1000), false)]);
    assert_eq!(rig.write_at(DEVICE, 0x1000), Ok(OLD));
}

#[test]
fn directories_stay_until_an_invalidation_names_them() {
    let rig = Rig::adversarial();
    let root = rig.table();
    rig.set_entry(DEVICE, translated(root, 3));
    rig.map(root, 3, 0x1000, page(PhysAddr::new(OLD)));
    rig.read_at(DEVICE, 0x1000).unwrap();
    // A new table takes the place of the old, which software believes unused.
    let slot = rig.entry_of(root, 3, 2, 0x1000);
    let new_table = rig.table();
    rig.store(slot, directory(new_table, 1).0[0]);
    rig.store(new_table.wrapping_add(8), page(PhysAddr::new(NEW)).0[0]);
    rig.run(&[flush(DOMAIN, page_of(0x1000), false)]);
    assert_eq!(rig.read_at(DEVICE, 0x1000), Ok(OLD), "PDE = 0 keeps the way to the old table");
    rig.run(&[flush(DOMAIN, page_of(0x4000_0000), true), flush(DOMAIN, page_of(0x1000), false)]);
    assert_eq!(rig.read_at(DEVICE, 0x1000), Ok(OLD), "PDE = 1 elsewhere does not reach it");
    rig.run(&[flush(DOMAIN, page_of(0x1000), true)]);
    assert_eq!(rig.read_at(DEVICE, 0x1000), Ok(NEW));
}

#[test]
fn caches_survive_iommu_en() {
    let rig = Rig::adversarial();
    stale(&rig);
    rig.write(regs::CONTROL, 0);
    assert_eq!(rig.read_at(DEVICE, 0x1000), Ok(0x1000));
    rig.write(regs::CONTROL, enabled().0[0]);
    assert_eq!(rig.read_at(DEVICE, 0x1000), Ok(OLD));
}

#[test]
fn a_cached_dirty_bit_is_not_set_again_until_the_page_is_invalidated() {
    let rig = Rig::adversarial();
    let root = rig.table();
    rig.set_entry(DEVICE, translated(root, 3).with_had(HAD_ACCESS_DIRTY));
    rig.map(root, 3, 0x1000, page(PhysAddr::new(OLD)));
    rig.write_at(DEVICE, 0x1000).unwrap();
    let leaf = rig.entry_of(root, 3, 1, 0x1000);
    assert!(Entry([rig.load(leaf)]).d());
    rig.store(leaf, Entry([rig.load(leaf)]).with_d(false).0[0]);
    rig.write_at(DEVICE, 0x1000).unwrap();
    assert!(!Entry([rig.load(leaf)]).d());
    rig.run(&[flush(DOMAIN, page_of(0x1000), false)]);
    rig.write_at(DEVICE, 0x1000).unwrap();
    assert!(Entry([rig.load(leaf)]).d());
}

#[test]
fn random_eviction_only_ever_brings_the_tables_nearer() {
    let rig = Rig::with(Config { policy: Policy::EvictRandom(3), ..Config::default() });
    stale(&rig);
    let seen: Vec<_> = (0..500).map(|_| rig.read_at(DEVICE, 0x1000).unwrap()).collect();
    let first_new = seen.iter().position(|&at| at == NEW).unwrap();
    assert!(seen[..first_new].iter().all(|&at| at == OLD));
    assert!(seen[first_new..].iter().all(|&at| at == NEW));
}
