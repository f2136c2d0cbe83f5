//! Random calls against a model that keeps bytes.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use lychgate_iommufd::{Access, AccessOps};
use lychgate_types::{Errno, PhysRun};
use proptest::prelude::*;

use crate::common::{PAGE, VA, World};

const IOASES: usize = 2;

#[derive(Clone, Debug)]
enum Call {
    Map {
        ioas: usize,
        page: u64,
        pages: u64,
        iova: u64,
    },
    MapAnywhere {
        ioas: usize,
        page: u64,
        pages: u64,
    },
    Unmap {
        ioas: usize,
        iova: u64,
        pages: u64,
    },
    Copy {
        from: usize,
        to: usize,
        iova: u64,
        pages: u64,
        dst: u64,
    },
    AddDomain {
        ioas: usize,
    },
    RemoveDomain {
        ioas: usize,
    },
    /// An access object of the IOAS pins.
    Pin {
        ioas: usize,
        iova: u64,
        pages: u64,
    },
    /// The access object unpins the oldest of what it has.
    Unpin {
        ioas: usize,
    },
    /// Restricts where mappings go by themselves to one range, or to none with no pages.
    Allow {
        ioas: usize,
        iova: u64,
        pages: u64,
    },
    /// Maps while the n-th pin, or map into a page table, fails.
    Fail {
        ioas: usize,
        page: u64,
        pages: u64,
        pins: u32,
        maps: u32,
    },
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
        3 => (ioas.clone(), ioas.clone(), iova.clone(), pages.clone(), iova.clone())
            .prop_map(|(from, to, iova, pages, dst)| Call::Copy { from, to, iova, pages, dst }),
        1 => ioas.clone().prop_map(|ioas| Call::AddDomain { ioas }),
        1 => ioas.clone().prop_map(|ioas| Call::RemoveDomain { ioas }),
        3 => (ioas.clone(), iova.clone(), pages.clone())
            .prop_map(|(ioas, iova, pages)| Call::Pin { ioas, iova, pages }),
        2 => ioas.clone().prop_map(|ioas| Call::Unpin { ioas }),
        1 => (ioas.clone(), iova, 0..33_u64)
            .prop_map(|(ioas, iova, pages)| Call::Allow { ioas, iova, pages }),
        1 => (ioas, 0..24_u64, pages, 0..2_u32, 0..3_u32).prop_map(
            |(ioas, page, pages, pins, maps)| Call::Fail { ioas, page, pages, pins, maps }),
    ];
    prop::collection::vec(call, 1..60)
}

/// An area: pages of a mapping, each as the number of the mapping and the page of the memory.
type Area = Vec<(u32, u64)>;

#[derive(Default)]
struct Model {
    areas: [BTreeMap<u64, Area>; IOASES],
    domains: [Vec<u32>; IOASES],
    /// What access objects have pinned: first IOVA, and the pages.
    pinned: [Vec<(u64, Area)>; IOASES],
    /// Where mappings go by themselves; anywhere when it is empty.
    allowed: [std::ops::Range<u64>; IOASES],
    mappings: u32,
}

/// A kernel user that unpins what it is asked for.
#[derive(Default)]
struct Driver {
    access: OnceLock<Weak<Access>>,
    /// First IOVA and length in bytes, the oldest first.
    pinned: Mutex<Vec<(u64, u64)>>,
}

impl AccessOps for Driver {
    fn unmap(&self, iova: u64, len: u64) {
        let Some(access) = self.access.get().and_then(Weak::upgrade) else {
            return;
        };
        let last = iova.saturating_add(len - 1);
        self.pinned.lock().unwrap().retain(|(start, len)| {
            let stays = *start > last || start + (len - 1) < iova;
            if !stays {
                access.unpin_pages(*start, *len);
            }
            stays
        });
    }
}

impl Driver {
    fn new(world: &World, ioas: u32) -> (Arc<Access>, Arc<Self>) {
        let driver = Arc::new(Self::default());
        let access = world.reference().create_access(Arc::clone(&driver) as _, true).unwrap();
        let access = Arc::new(access);
        driver.access.set(Arc::downgrade(&access)).unwrap();
        access.attach(ioas).unwrap();
        (access, driver)
    }
}

/// Where the frame of each page of some runs is.
fn frames(runs: &[PhysRun]) -> Vec<u64> {
    let pages = |run: &PhysRun| (run.start.get()..run.start.get() + run.len).step_by(4096);
    runs.iter().flat_map(pages).collect()
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
            self.pinned[ioas]
                .retain(|(iova, pages)| *iova >= first + len || iova + pages.len() as u64 <= first);
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
    fn pages(&self, world: &World, ioas: usize) -> BTreeMap<u64, u64> {
        let areas = self.areas[ioas].iter();
        areas
            .flat_map(|(first, area)| {
                (*first..)
                    .zip(area)
                    .map(|(iova, (_, page))| (iova * PAGE, world.client.mm.frame(*page)))
            })
            .collect()
    }

    /// What is mapped at a range, if all of it is.
    fn range(&self, ioas: usize, iova: u64, pages: u64) -> Option<Area> {
        (iova..iova + pages).map(|iova| self.page_at(ioas, iova)).collect()
    }

    /// Whether `pages` fit somewhere in what is allowed, aligned to `alignment` pages.
    fn fits(&self, ioas: usize, pages: u64, alignment: u64) -> bool {
        let allowed = &self.allowed[ioas];
        // Page 0 is never given out.
        let mut starts =
            (allowed.start.max(1)..allowed.end).filter(|at| at.is_multiple_of(alignment));
        allowed.is_empty()
            || starts.any(|at| at + pages <= allowed.end && self.free(ioas, at, pages))
    }

    /// How often each page of the memory has to be pinned: once per mapping that is in use.
    fn pins(&self) -> HashMap<u64, u32> {
        let mut used: Vec<(u32, u64)> = (0..IOASES)
            .filter(|ioas| !self.domains[*ioas].is_empty())
            .flat_map(|ioas| self.areas[ioas].values().flatten().copied())
            .collect();
        used.extend(self.pinned.iter().flatten().flat_map(|(_, pages)| pages).copied());
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
    fn areas_behave_as_the_model(calls in calls(), scattered in any::<bool>()) {
        let world = World::new();
        world.client.mm.books.lock().unwrap().scattered = scattered;
        let device = world.device(0x100);
        let bound = world.reference().bind(device).unwrap();
        let ids = [world.ioas(), world.ioas()];
        let users = ids.map(|ioas| Driver::new(&world, ioas));
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
                    let natural = pages.next_power_of_two();
                    let alignment = match page {
                        0 => natural,
                        _ => natural.min(1 << page.trailing_zeros()),
                    };
                    let iova = world.map_anywhere(ids[ioas], VA + page * PAGE, pages * PAGE);
                    if model.fits(ioas, pages, alignment) {
                        let iova = iova.unwrap() / PAGE;
                        let allowed = &model.allowed[ioas];
                        let inside = allowed.contains(&iova) && iova + pages <= allowed.end;
                        prop_assert!(allowed.is_empty() || inside);
                        prop_assert!(iova > 0 && iova.is_multiple_of(alignment));
                        prop_assert!(model.free(ioas, iova, pages));
                        model.map(ioas, page, pages, iova);
                    } else {
                        prop_assert_eq!(iova, Err(Errno::ENOSPC));
                    }
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
                Call::Pin { ioas, iova, pages } => {
                    let (access, driver) = &users[ioas];
                    let (at, len) = (iova * PAGE, pages * PAGE);
                    let result = access.pin_pages(at, len, true);
                    match model.range(ioas, iova, pages) {
                        Some(found) => {
                            let expected: Vec<u64> =
                                found.iter().map(|(_, page)| world.client.mm.frame(*page)).collect();
                            prop_assert_eq!(frames(&result.unwrap()), expected);
                            driver.pinned.lock().unwrap().push((at, len));
                            model.pinned[ioas].push((iova, found));
                        }
                        None => prop_assert_eq!(result.unwrap_err().errno, Errno::ENOENT),
                    }
                }
                Call::Unpin { ioas } => {
                    let (access, driver) = &users[ioas];
                    let mut pinned = driver.pinned.lock().unwrap();
                    prop_assert_eq!(pinned.len(), model.pinned[ioas].len());
                    if !pinned.is_empty() {
                        let (iova, len) = pinned.remove(0);
                        access.unpin_pages(iova, len);
                        model.pinned[ioas].remove(0);
                    }
                }
                Call::Allow { ioas, iova, pages } => {
                    let range = [(iova * PAGE, (iova + pages).wrapping_mul(PAGE).wrapping_sub(1))];
                    let list = if pages == 0 { &[][..] } else { &range };
                    prop_assert_eq!(world.allow(ids[ioas], list), Ok(()));
                    model.allowed[ioas] = iova..iova + pages;
                }
                Call::Fail { ioas, page, pages, pins, maps } => {
                    world.client.mm.books.lock().unwrap().pins_left = Some(pins);
                    world.driver.plan(|plan| plan.maps_left = Some(maps));
                    // Behind everything else.
                    let iova = 1 << 20;
                    let (va, len) = (VA + page * PAGE, pages * PAGE);
                    let result = world.map_fixed(ids[ioas], va, len, iova * PAGE);
                    world.client.mm.books.lock().unwrap().pins_left = None;
                    world.driver.plan(|plan| plan.maps_left = None);
                    let domains = model.domains[ioas].len();
                    match result {
                        Ok(_) => prop_assert_eq!(world.unmap(ids[ioas], iova * PAGE, len), Ok(len)),
                        Err(errno) if domains > 0 && pins == 0 => {
                            prop_assert_eq!(errno, Errno::EFAULT);
                        }
                        Err(errno) => {
                            prop_assert_eq!(errno, Errno::ENOMEM);
                            prop_assert!(domains > maps as usize);
                        }
                    }
                }
            }
            for (domain, (ioas, _)) in world.driver.domains().iter().zip(&order) {
                prop_assert_eq!(domain.pages(), model.pages(&world, *ioas));
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
        users.iter().for_each(|(access, _)| access.detach());
        prop_assert_eq!(world.client.mm.pinned(), 0);
        prop_assert_eq!(world.client.mm.charged(lychgate_iommufd::Accounting::User), 0);
    }
}
