//! The rules of AMD 48882 about what may be cached, as far as a copy can break them.
//!
//! A change of a table takes effect for sure when the commands of its rule have completed: a
//! COMPLETION_WAIT after them has stored its data (2.4.1).

use lychgate_model::{Certainty, Rule};

pub(super) static UNMAP: Rule = Rule {
    id: "amd-vi/unmap",
    change: "a page is unmapped",
    needs: "INVALIDATE_IOMMU_PAGES over the range, then COMPLETION_WAIT",
    consequence: "devices still reach the old frame, whoever owns it by then",
    section: "AMD 48882 2.4.3",
    certainty: Certainty::A,
    tolerable: false,
};

pub(super) static PERMISSION_TAKEN: Rule = Rule {
    id: "amd-vi/permission-taken",
    change: "a permission is taken from a page or a directory",
    needs: "INVALIDATE_IOMMU_PAGES over the range, then COMPLETION_WAIT",
    consequence: "devices go on as if they still had it",
    section: "AMD 48882 2.4.3",
    certainty: Certainty::A,
    tolerable: false,
};

pub(super) static PERMISSION_GIVEN: Rule = Rule {
    id: "amd-vi/permission-given",
    change: "a permission is given to a page or a directory that is present",
    needs: "INVALIDATE_IOMMU_PAGES over the range, then COMPLETION_WAIT",
    consequence: "devices get a fault for what they may do",
    section: "AMD 48882 2.4.3",
    certainty: Certainty::A,
    tolerable: true,
};

pub(super) static REMAP: Rule = Rule {
    id: "amd-vi/remap",
    change: "a page gets another frame",
    needs: "INVALIDATE_IOMMU_PAGES over the range, then COMPLETION_WAIT",
    consequence: "devices reach the old frame, or either of the two",
    section: "AMD 48882 2.4.3",
    certainty: Certainty::A,
    tolerable: false,
};

pub(super) static TABLE_REPLACED_BY_PAGE: Rule = Rule {
    id: "amd-vi/collapse",
    change: "a page takes the place of a table",
    needs: "INVALIDATE_IOMMU_PAGES with PDE = 1 over the whole of it, then COMPLETION_WAIT, before \
            the table is used for anything else",
    consequence: "walks go on through the old table, whatever it holds by then",
    section: "AMD 48882 2.4.3",
    certainty: Certainty::A,
    tolerable: false,
};

pub(super) static TABLE_FREED: Rule = Rule {
    id: "amd-vi/free-table",
    change: "a table is taken out of the page tables",
    needs: "INVALIDATE_IOMMU_PAGES with PDE = 1 over what it covered, then COMPLETION_WAIT, before \
            it is freed",
    consequence: "walks go on through the old table, whatever it holds by then",
    section: "AMD 48882 2.4.3",
    certainty: Certainty::A,
    tolerable: false,
};

pub(super) static DIRTY_CLEARED: Rule = Rule {
    id: "amd-vi/clear-dirty",
    change: "a dirty bit is cleared",
    needs: "INVALIDATE_IOMMU_PAGES over the range, then COMPLETION_WAIT, before the page counts as \
            clean",
    consequence: "later writes to the page are not recorded",
    section: "AMD 48882 2.2.3.1, 2.4.3",
    certainty: Certainty::A,
    tolerable: false,
};

pub(super) static MALFORMED: Rule = Rule {
    id: "amd-vi/malformed",
    change: "an entry that was valid becomes malformed",
    needs: "entries that the walker accepts, and INVALIDATE_IOMMU_PAGES for those that replace others",
    consequence: "devices get faults as soon as the copy goes",
    section: "AMD 48882 2.2.3",
    certainty: Certainty::A,
    tolerable: false,
};

pub(super) static FIRST_ATTACH: Rule = Rule {
    id: "amd-vi/first-attach",
    change: "a device table entry becomes valid",
    needs: "INVALIDATE_DEVTAB_ENTRY for every id of the device, then COMPLETION_WAIT",
    consequence: "a copy with V = 0 lets every request pass untranslated",
    section: "AMD 48882 2.2.2.1, 2.4.2",
    certainty: Certainty::A,
    tolerable: false,
};

pub(super) static DEVICE_ENTRY: Rule = Rule {
    id: "amd-vi/device-entry",
    change: "a device table entry changes how requests are translated",
    needs: "INVALIDATE_DEVTAB_ENTRY for every id of the device, then COMPLETION_WAIT",
    consequence: "requests go by the old tables, the old domain or the old permissions",
    section: "AMD 48882 2.4.2",
    certainty: Certainty::A,
    tolerable: false,
};

pub(super) static DEVICE_ENTRY_INTERRUPTS: Rule = Rule {
    id: "amd-vi/device-entry-interrupts",
    change: "a device table entry changes how interrupts are mapped",
    needs: "INVALIDATE_DEVTAB_ENTRY and INVALIDATE_INTERRUPT_TABLE for every id of the device, then \
            COMPLETION_WAIT",
    consequence: "interrupts go by the old table",
    section: "AMD 48882 2.4.2, 2.4.5",
    certainty: Certainty::A,
    tolerable: false,
};

pub(super) static DOMAIN_LEFT: Rule = Rule {
    id: "amd-vi/domain-left",
    change: "a device table entry names other tables under the same DomainID",
    needs: "INVALIDATE_DEVTAB_ENTRY, COMPLETION_WAIT, then INVALIDATE_IOMMU_PAGES of the whole \
            DomainID with PDE = 1, then COMPLETION_WAIT",
    consequence: "requests hit translations of the old tables",
    section: "AMD 48882 2.4.2, 2.4.3; XSA-442",
    certainty: Certainty::B,
    tolerable: false,
};

pub(super) static DOMAIN_REUSED: Rule = Rule {
    id: "amd-vi/domain-reused",
    change: "a DomainID is used again for other tables",
    needs: "INVALIDATE_IOMMU_PAGES of the whole DomainID with PDE = 1, then COMPLETION_WAIT, after \
            its last user has gone",
    consequence: "requests hit translations of whoever had the DomainID before",
    section: "AMD 48882 2.2.2 Table 7, 2.4.3",
    certainty: Certainty::A,
    tolerable: false,
};

pub(super) static DOMAIN_SHARED: Rule = Rule {
    id: "amd-vi/domain-shared",
    change: "devices share a DomainID",
    needs: "the same tables, the same Mode and the same permissions in all their entries",
    consequence: "requests of one hit translations of the other",
    section: "AMD 48882 2.2.2 Table 7",
    certainty: Certainty::A,
    tolerable: false,
};

pub(super) static INTERRUPT_ENTRY: Rule = Rule {
    id: "amd-vi/interrupt-entry",
    change: "an interrupt remapping entry changes in more than its destination",
    needs: "INVALIDATE_INTERRUPT_TABLE for every id of the device, then COMPLETION_WAIT",
    consequence: "interrupts arrive as the old entry says",
    section: "AMD 48882 2.4.5",
    certainty: Certainty::A,
    tolerable: false,
};

pub(super) static DEVICE_TABLE: Rule = Rule {
    id: "amd-vi/device-table",
    change: "the device table moves or shrinks",
    needs: "IommuEn = 0 meanwhile, or INVALIDATE_IOMMU_ALL and COMPLETION_WAIT",
    consequence: "requests go by entries of the old table",
    section: "AMD 48882 3.4.2",
    certainty: Certainty::B,
    tolerable: false,
};

/// Every rule.
pub(super) static ALL: [&Rule; 16] = [
    &UNMAP,
    &PERMISSION_TAKEN,
    &PERMISSION_GIVEN,
    &REMAP,
    &TABLE_REPLACED_BY_PAGE,
    &TABLE_FREED,
    &DIRTY_CLEARED,
    &MALFORMED,
    &FIRST_ATTACH,
    &DEVICE_ENTRY,
    &DEVICE_ENTRY_INTERRUPTS,
    &DOMAIN_LEFT,
    &DOMAIN_REUSED,
    &DOMAIN_SHARED,
    &INTERRUPT_ENTRY,
    &DEVICE_TABLE,
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_rule_has_a_name_of_its_own() {
        let names: BTreeSet<&str> = ALL.iter().map(|rule| rule.id).collect();
        assert_eq!(names.len(), ALL.len());
        assert!(names.iter().all(|name| name.starts_with("amd-vi/")));
    }
}
