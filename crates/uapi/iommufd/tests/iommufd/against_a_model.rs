//! Random calls against a model that keeps bytes.

use std::collections::{BTreeMap, HashMap};

use lychgate_types::Errno;
use proptest::prelude::*;

use crate::common::{PAGE, PHYS, VA, World};

const IOASES: usize = 2;

#[derive(Clone, Debug)]
enum Call {
    Map { ioas: usize, page: u64, pages: u64, iova: u64 },
    MapAnywhere { ioas: usize, page: u64, pages: u64 },
    Unmap { ioas: usize, iova: u64, pages: u64 },
    Copy { from: usize, to: usize, iova: u64, pages: u64, dst: u64 },
    AddDomain { ioas: usize },
    RemoveDomain { ioas: usize },
}

fn calls() -> impl Strategy<Value = Vec<Call>> {
    let (ioas, page, pages, iova) = (0..IOASES, 0..24_u64, 1..9_u64, 0..32_u64);
    let call = prop_oneof![
        3 => (ioas.clone(), page.clone(), pages.clone(), iova.clone())
            .prop_map(|(ioas, page, pages, iova)| Call::Map { ioas, page, pages, iova }),
        1 => (ioas.clone(), page, pages.clone())
            .prop_map(|(ioas, page, pages)| Call::MapAnywhere { ioas, page, pages }),
        3 => (ioas.clone(), iova.clone(), 1..33_u64)
            .prop_map(|(ioas, iova, pages)| Call::Unmap { ioas, iova, pages }),
        3 => (ioas.clone(), ioas.clone(), iova.clone(), pages, iova)
            .prop_map(|(from, to, iova, pages, dst)| Call::Copy { from, to, iova, pages, dst }),
        1 => ioas.clone().prop_map(|ioas| Call::AddDomain { ioas }),
        1 => ioas.prop_map(|ioas| Call::RemoveDomain { ioas }),
    ];
    prop::collection::vec(call, 1..60)
}

/// An area: pages of a mapping, each as the number of the mapping and the page of the memory.
type Area = Vec<(u32, u64)>;

#[derive(Default)]
struct Model {
    areas: [BTreeMap<u64, Area>; IOASES],
    domains: [Vec<u32>; IOASES],
    mappings: u32,
}

impl Model {
    fn page_at(&self, ioas: usize, iova: u64) -> Option<(u32, u64)> {
        let (first, area) = self.areas[ioas].range(..=iova).next_back()?;
        area.get(usize::try_from(iova - first).unwrap()).copied()
    }

    fn free(&self, ioas: usize, iova: u64, pages: u64) -> bool {
        (iova..iova + pages).all(|iova| self.page_at(ioas, iova).is_none())
    }

    fn map(&mut self, ioas: usize, page: u64, pages: u64, iova: u64) {
        self.mappings += 1;
        let area = (page..page + pages).map(|page| (self.mappings, page)).collect();
        self.areas[ioas].insert(iova, area);
    }

    /// As Linux: areas go one after the other, up to the first that is not all inside.
    fn unmap(&mut self, ioas: usize, iova: u64, pages: u64) -> Result<u64, Errno> {
        let mut bytes = 0;
        let overlapping: Vec<_> = self.areas[ioas]
            .iter()
            .filter(|(first, area)| **first < iova + pages && iova < **first + area.len() as u64)
            .map(|(first, area)| (*first, area.len() as u64))
            .collect();
        for (first, len) in overlapping {
            if first < iova || first + len > iova + pages {
                return Err(Errno::ENOENT);
            }
            self.areas[ioas].remove(&first);
            bytes += len * PAGE;
        }
        if bytes == 0 { Err(Errno::ENOENT) } else { Ok(bytes) }
    }

    fn copy(
        &mut self,
        from: usize,
        to: usize,
        iova: u64,
        pages: u64,
        dst: u64,
    ) -> Result<u64, Errno> {
        let source: Option<Vec<_>> =
            (iova..iova + pages).map(|iova| self.page_at(from, iova)).collect();
        let source = source.ok_or(Errno::ENOENT)?;
        if !self.free(to, dst, pages) {
            return Err(Errno::EEXIST);
        }
        // Each area of the source becomes one.
        let mut start = 0;
        for at in 1..=pages {
            let cut = at == pages || self.areas[from].contains_key(&(iova + at));
            if cut {
                let range = usize::try_from(start).unwrap()..usize::try_from(at).unwrap();
                self.areas[to].insert(dst + start, source[range].to_vec());
                start = at;
            }
        }
        Ok(dst * PAGE)
    }

    /// What a domain of the IOAS has to map.
    fn pages(&self, ioas: usize) -> BTreeMap<u64, u64> {
        let areas = self.areas[ioas].iter();
        areas
            .flat_map(|(first, area)| {
                (*first..).zip(area).map(|(iova, (_, page))| (iova * PAGE, PHYS + page * PAGE))
            })
            .collect()
    }

    /// How often each page of the memory has to be pinned: once per mapping that is in use.
    fn pins(&self) -> HashMap<u64, u32> {
        let mut used: Vec<(u32, u64)> = (0..IOASES)
            .filter(|ioas| !self.domains[*ioas].is_empty())
            .flat_map(|ioas| self.areas[ioas].values().flatten().copied())
            .collect();
        used.sort_unstable();
        used.dedup();
        let mut pins = HashMap::new();
        for (_, page) in used {
            *pins.entry(page).or_default() += 1;
        }
        pins
    }
}

proptest! {
    #[test]
    fn areas_behave_as_the_model(calls in calls()) {
        let world = World::new();
        let device = world.device(0x100);
        let bound = world.reference().bind(device).unwrap();
        let ids = [world.ioas(), world.ioas()];
        let mut model = Model::default();
        let mut order = Vec::new();
        for call in calls {
            match call {
                Call::Map { ioas, page, pages, iova } => {
                    let result =
                        world.map_fixed(ids[ioas], VA + page * PAGE, pages * PAGE, iova * PAGE);
                    if model.free(ioas, iova, pages) {
                        prop_assert_eq!(result, Ok(iova * PAGE));
                        model.map(ioas, page, pages, iova);
                    } else {
                        prop_assert_eq!(result, Err(Errno::EEXIST));
                    }
                }
                Call::MapAnywhere { ioas, page, pages } => {
                    let iova = world.map_anywhere(ids[ioas], VA + page * PAGE, pages * PAGE);
                    let iova = iova.unwrap() / PAGE;
                    prop_assert!(iova > 0 && model.free(ioas, iova, pages));
                    model.map(ioas, page, pages, iova);
                }
                Call::Unmap { ioas, iova, pages } => {
                    let result = world.unmap(ids[ioas], iova * PAGE, pages * PAGE);
                    prop_assert_eq!(result, model.unmap(ioas, iova, pages));
                }
                Call::Copy { from, to, iova, pages, dst } => {
                    let result =
                        world.copy((ids[from], iova * PAGE), (ids[to], dst * PAGE), pages * PAGE);
                    prop_assert_eq!(result, model.copy(from, to, iova, pages, dst));
                }
                Call::AddDomain { ioas } => {
                    let hwpt = world.hwpt(bound.id(), ids[ioas]).unwrap();
                    model.domains[ioas].push(hwpt);
                    order.push((ioas, hwpt));
                }
                Call::RemoveDomain { ioas } => {
                    if let Some(hwpt) = model.domains[ioas].pop() {
                        world.destroy(hwpt).unwrap();
                        order.retain(|entry| *entry != (ioas, hwpt));
                    }
                }
            }
            for (domain, (ioas, _)) in world.driver.domains().iter().zip(&order) {
                prop_assert_eq!(domain.pages(), model.pages(*ioas));
            }
            let pins = model.pins();
            for page in 0..40 {
                let expected = pins.get(&page).copied().unwrap_or(0);
                prop_assert_eq!(world.client.mm.pins(VA + page * PAGE), expected, "page {}", page);
            }
        }
        for (_, hwpt) in order {
            world.destroy(hwpt).unwrap();
        }
        prop_assert_eq!(world.client.mm.pinned(), 0);
        prop_assert_eq!(world.client.mm.charged(lychgate_iommufd::Accounting::User), 0);
    }
}
