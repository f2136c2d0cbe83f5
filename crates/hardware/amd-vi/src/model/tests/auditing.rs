//! The checker: which change without its commands is found, by which rule, and which is none.

use super::*;
use crate::model::rules;
use crate::spec::dte::HAD_ACCESS_DIRTY;
use crate::spec::irte::BYTES_128;
use crate::spec::size::Block;
use crate::spec::{Irte128, dte};
use lychgate_model::{Audit, Finding, IommuPort, Scope};

const AT: u64 = 0x1000;
const OLD: PhysAddr = PhysAddr::new(0x1_0000);
const NEW: PhysAddr = PhysAddr::new(0x2_0000);

/// A device with three levels, and one page, which it has read.
fn mapped() -> (Rig, PhysAddr) {
    let rig = Rig::checking();
    let root = rig.table();
    rig.set_entry(DEVICE, translated(root, 3));
    rig.map(root, 3, AT, page(OLD));
    rig.run(&[Command::invalidate_devtab_entry(DEVICE)]);
    assert_eq!(rig.read_at(DEVICE, AT), Ok(OLD.get()));
    assert_eq!(rig.iommu.audit(Scope::Everything), []);
    (rig, root)
}

fn flush(block: Block, pde: bool) -> Command {
    Command::invalidate_iommu_pages(u16::try_from(DOMAIN).unwrap(), block, pde)
}

fn page_block(at: u64) -> Block {
    Block { start: at & !0xfff, order: 12 }
}

/// The one rule that is broken.
fn broken(rig: &Rig) -> &'static str {
    let findings = rig.iommu.audit(Scope::Everything);
    assert_eq!(rig.iommu.audit(Scope::Everything), [], "reported twice");
    let ids: Vec<&str> = findings.iter().map(|finding| finding.rule.id).collect();
    assert_eq!(ids.len(), 1, "{findings:#?}");
    assert!(rules().iter().any(|rule| rule.id == ids[0]));
    ids[0]
}

#[test]
fn a_page_that_was_unmapped_without_a_command() {
    let (rig, root) = mapped();
    rig.map(root, 3, AT, Entry::default());
    assert_eq!(broken(&rig), "amd-vi/unmap");
    let (rig, root) = mapped();
    rig.map(root, 3, AT, Entry::default());
    rig.run(&[flush(page_block(AT), false)]);
    assert_eq!(rig.iommu.audit(Scope::Everything), []);
}

#[test]
fn a_stale_use_is_told_with_what_changed_since() {
    let (rig, root) = mapped();
    rig.map(root, 3, AT, Entry::default());
    assert_eq!(rig.write_at(DEVICE, AT + 8), Ok(OLD.get() + 8));
    assert_eq!(rig.write_at(DEVICE, AT + 16), Ok(OLD.get() + 16));
    let [finding] = <[Finding; 1]>::try_from(rig.iommu.audit(Scope::Everything)).unwrap();
    let used = finding.used.unwrap();
    assert_eq!((used.requester, used.at.get(), used.times), (DEVICE, AT + 8, 2));
    assert_eq!(used.access, Access::Write);
    let [word] = <[_; 1]>::try_from(finding.words.clone()).unwrap();
    assert_eq!((word.at, word.now), (rig.entry_of(root, 3, 1, AT), Some(0)));
    assert_eq!(word.then, page(OLD).0[0]);
    assert_eq!(
        finding.to_string(),
        "stale translation of 01:01.0: the cache says frame 0x10000 read-write, the tables say \
         nothing is mapped [amd-vi/unmap]"
    );
}

#[test]
fn another_frame_and_other_permissions() {
    let cases = [
        (page(NEW), "amd-vi/remap", true),
        (page(OLD).with_iw(false), "amd-vi/permission-taken", true),
        (page(OLD).with_next_level(5), "amd-vi/malformed", true),
    ];
    for (entry, rule, strict) in cases {
        let (rig, root) = mapped();
        rig.map(root, 3, AT, entry);
        let findings = rig.iommu.audit(Scope::Everything);
        assert_eq!(findings.len(), 1, "{findings:#?}");
        assert_eq!((findings[0].rule.id, findings[0].rule.is_strict()), (rule, strict));
    }
    let (rig, root) = mapped();
    rig.map(root, 3, AT, page(OLD).with_iw(false));
    rig.run(&[flush(page_block(AT), false)]);
    assert_eq!(rig.read_at(DEVICE, AT), Ok(OLD.get()));
    rig.map(root, 3, AT, page(OLD));
    let findings = rig.iommu.audit(Scope::Everything);
    assert_eq!(findings[0].rule.id, "amd-vi/permission-given");
    assert!(!findings[0].rule.is_strict(), "software may wait for the fault");
}

#[test]
fn a_table_that_is_taken_out_needs_pde() {
    for pde in [false, true] {
        let (rig, root) = mapped();
        let slot = rig.entry_of(root, 3, 2, AT);
        rig.store(slot, 0);
        rig.run(&[flush(page_block(AT), pde)]);
        if pde {
            assert_eq!(rig.iommu.audit(Scope::Everything), []);
        } else {
            assert_eq!(broken(&rig), "amd-vi/free-table");
        }
    }
}

#[test]
fn a_page_in_the_place_of_a_table_needs_pde() {
    let (rig, root) = mapped();
    let slot = rig.entry_of(root, 3, 2, AT);
    // The same frame behind the page, so that nothing but the directory is stale.
    rig.store(slot, page(PhysAddr::new(0)).0[0]);
    rig.run(&[flush(page_block(AT), false)]);
    assert_eq!(broken(&rig), "amd-vi/collapse");
}

#[test]
fn a_large_page_that_becomes_the_same_small_ones_is_no_difference() {
    let rig = Rig::checking();
    let root = rig.table();
    rig.set_entry(DEVICE, translated(root, 3));
    let slot = rig.entry_of(root, 3, 2, 0x20_0000);
    rig.store(slot, page(PhysAddr::new(0x4000_0000)).0[0]);
    assert_eq!(rig.read_at(DEVICE, 0x20_0000), Ok(0x4000_0000));
    let table = rig.table();
    for index in 0..512 {
        let small = page(PhysAddr::new(0x4000_0000 + index * 0x1000));
        rig.store(table.wrapping_add(index * 8), small.0[0]);
    }
    rig.store(slot, directory(table, 1).0[0]);
    assert_eq!(rig.iommu.audit(Scope::Everything), []);
    rig.store(table.wrapping_add(511 * 8), 0);
    assert_eq!(broken(&rig), "amd-vi/unmap");
}

#[test]
fn a_cleared_dirty_bit_needs_an_invalidation() {
    let rig = Rig::checking();
    let root = rig.table();
    rig.set_entry(DEVICE, translated(root, 3).with_had(HAD_ACCESS_DIRTY));
    rig.map(root, 3, AT, page(OLD));
    assert_eq!(rig.write_at(DEVICE, AT), Ok(OLD.get()));
    let slot = rig.entry_of(root, 3, 1, AT);
    rig.store(slot, rig.load(slot) & !(1 << 6));
    assert_eq!(broken(&rig), "amd-vi/clear-dirty");
}

#[test]
fn device_entries_need_their_command() {
    let rig = Rig::checking();
    assert_eq!(rig.read_at(DEVICE, AT), Ok(AT), "V = 0");
    rig.set_entry(DEVICE, Dte::default().with_v(true));
    assert_eq!(broken(&rig), "amd-vi/first-attach");

    let (rig, root) = mapped();
    rig.set_entry(DEVICE, translated(root, 3).with_iw(false));
    let ids: Vec<&str> =
        rig.iommu.audit(Scope::Everything).iter().map(|finding| finding.rule.id).collect();
    // Both what it says and what was found through it.
    assert_eq!(ids[0], "amd-vi/device-entry");
    assert!(ids[1..].iter().all(|id| *id == "amd-vi/permission-taken"), "{ids:?}");

    let (rig, root) = mapped();
    let entry = translated(root, 3).with_iv(true).with_int_ctl(dte::INT_CTL_REMAP);
    rig.set_entry(DEVICE, entry);
    assert_eq!(broken(&rig), "amd-vi/device-entry-interrupts");
}

#[test]
fn tables_that_change_under_one_domain_id() {
    let (rig, _) = mapped();
    let other = rig.table();
    rig.map(other, 3, AT, page(NEW));
    rig.set_entry(DEVICE, translated(other, 3));
    rig.run(&[Command::invalidate_devtab_entry(DEVICE)]);
    let findings = rig.iommu.audit(Scope::Everything);
    assert!(!findings.is_empty());
    assert!(findings.iter().all(|finding| finding.rule.id == "amd-vi/domain-left"), "XSA-442");
}

#[test]
fn a_domain_id_that_serves_again_too_soon() {
    let (rig, _) = mapped();
    rig.set_entry(DEVICE, Dte::default().with_v(true));
    rig.run(&[Command::invalidate_devtab_entry(DEVICE)]);
    assert_eq!(rig.iommu.audit(Scope::Everything), [], "nobody reaches what is left");
    let other = rig.table();
    rig.map(other, 3, AT, page(NEW));
    rig.set_entry(OTHER, translated(other, 3));
    rig.run(&[Command::invalidate_devtab_entry(OTHER)]);
    let findings = rig.iommu.audit(Scope::Everything);
    assert!(findings.iter().all(|finding| finding.rule.id == "amd-vi/domain-reused"));
    assert!(findings.iter().any(|finding| finding.filled_by == Some(DEVICE)));
    assert!(findings.iter().all(|finding| finding.requester == OTHER));
}

#[test]
fn two_devices_that_share_a_domain_id_but_not_their_tables() {
    let (rig, _) = mapped();
    let other = rig.table();
    rig.map(other, 3, AT, page(NEW));
    rig.set_entry(OTHER, translated(other, 3));
    rig.run(&[Command::invalidate_devtab_entry(OTHER), flush(Block::ALL, true)]);
    assert_eq!(rig.read_at(DEVICE, AT), Ok(OLD.get()));
    assert_eq!(rig.read_at(OTHER, AT), Ok(OLD.get()), "the other's page");
    let findings = rig.iommu.audit(Scope::Everything);
    assert!(!findings.is_empty());
    assert!(findings.iter().all(|finding| finding.rule.id == "amd-vi/domain-shared"));
}

#[test]
fn a_root_that_grows_keeps_its_copies() {
    let (rig, root) = mapped();
    let top = rig.table();
    rig.store(top, directory(root, 3).0[0]);
    rig.set_entry(DEVICE, translated(top, 4));
    rig.run(&[Command::invalidate_devtab_entry(DEVICE)]);
    assert_eq!(rig.iommu.audit(Scope::Everything), []);
    rig.map(root, 3, AT, Entry::default());
    assert_eq!(broken(&rig), "amd-vi/unmap", "not a matter of the DomainID");
}

#[test]
fn an_interrupt_entry_may_change_its_destination_alone() {
    let rig = Rig::checking();
    let table = rig.table();
    let entry = Dte::default()
        .with_v(true)
        .with_iv(true)
        .with_int_ctl(dte::INT_CTL_REMAP)
        .with_int_tab_len(3)
        .with_int_table_root(table);
    rig.set_entry(DEVICE, entry);
    let irte = Irte128::default().with_remap_en(true).with_vector(0x41).with_destination_low(1);
    let slot = table.wrapping_add(2 * BYTES_128);
    let set = |irte: Irte128| {
        rig.store(slot, irte.0[0]);
        rig.store(slot.wrapping_add(8), irte.0[1]);
    };
    set(irte);
    assert!(rig.iommu.remap_msi(DEVICE, 0xfee0_0000, 2).is_some());
    set(irte.with_destination_low(7));
    assert_eq!(rig.iommu.audit(Scope::Everything), []);
    set(irte.with_vector(0x42));
    assert_eq!(broken(&rig), "amd-vi/interrupt-entry");
}

#[test]
fn commands_wait_for_a_completion_wait() {
    let checking = Checking { fetch_ahead: false, late_commands: true };
    let config =
        Config { policy: Policy::Adversarial, checking: Some(checking), ..Config::default() };
    let rig = Rig::with(config);
    let root = rig.table();
    rig.set_entry(DEVICE, translated(root, 3));
    rig.map(root, 3, AT, page(OLD));
    assert_eq!(rig.read_at(DEVICE, AT), Ok(OLD.get()));
    rig.map(root, 3, AT, Entry::default());
    rig.command(flush(page_block(AT), false));
    assert_eq!(rig.read_at(DEVICE, AT), Ok(OLD.get()), "nobody waited");
    rig.run(&[]);
    assert_eq!(rig.read_at(DEVICE, AT), Err(AT));
}

#[test]
fn what_is_invalidated_before_it_changes_is_fetched_again() {
    let config = Config {
        policy: Policy::Adversarial,
        checking: Some(Checking::default()),
        ..Config::default()
    };
    let rig = Rig::with(config);
    let root = rig.table();
    rig.set_entry(DEVICE, translated(root, 3));
    rig.map(root, 3, AT, page(OLD));
    rig.map(root, 3, AT + 0x1000, page(NEW));
    assert_eq!(rig.read_at(DEVICE, AT), Ok(OLD.get()));
    rig.run(&[flush(page_block(AT), false)]);
    rig.map(root, 3, AT, Entry::default());
    assert_eq!(broken(&rig), "amd-vi/unmap");
    rig.map(root, 3, AT + 0x1000, Entry::default());
    assert_eq!(broken(&rig), "amd-vi/unmap", "its neighbour was never asked for");
}

#[test]
fn a_model_that_does_not_check_has_nothing_to_say() {
    let rig = Rig::adversarial();
    let root = rig.table();
    rig.set_entry(DEVICE, translated(root, 3));
    rig.map(root, 3, AT, page(OLD));
    assert_eq!(rig.read_at(DEVICE, AT), Ok(OLD.get()));
    rig.map(root, 3, AT, Entry::default());
    assert_eq!(rig.iommu.audit(Scope::Everything), []);
}

#[test]
fn an_audit_of_a_range_looks_nowhere_else() {
    let (rig, root) = mapped();
    rig.map(root, 3, AT, Entry::default());
    assert_eq!(rig.iommu.audit(Scope::Addresses(AT + 0x1000, u64::MAX)), []);
    assert_eq!(rig.iommu.audit(Scope::Addresses(AT + 0xfff, AT + 0xfff)).len(), 1);
}
