//! The modules of an address space: programs and libraries with their unwind tables.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use framehop::x86_64::{CacheX86_64, UnwinderX86_64};
use framehop::{
    ExplicitModuleSectionInfo, MayAllocateDuringUnwind, Module as Unwindable, Unwinder,
};
use object::{Object, ObjectSection, ObjectSegment, ReadCache};

use crate::target::{Mapping, Target};

/// A file with code.
#[derive(PartialEq, Eq, Hash, Debug)]
pub(crate) struct Module {
    /// As this process can open it.
    pub(crate) path: PathBuf,
    /// As the program knows it.
    pub(crate) name: String,
}

/// Where code of a module is.
struct Code {
    start: u64,
    end: u64,
    /// What an address in the file has to be increased by, modulo 2^64.
    bias: u64,
    module: Arc<Module>,
}

/// The modules of one address space.
#[derive(Default)]
pub(crate) struct Modules {
    code: Vec<Code>,
    pub(crate) unwinder: UnwinderX86_64<Vec<u8>, MayAllocateDuringUnwind>,
    pub(crate) cache: CacheX86_64<MayAllocateDuringUnwind>,
    /// Addresses that were in no module although the mappings had just been read.
    strangers: u32,
}

/// Times that mappings are read for addresses which turn out to be in none.
const MOST_STRANGERS: u32 = 64;

impl Modules {
    /// Makes the module of `at` known, if it is in one.
    pub(crate) fn look_for(&mut self, at: u64, target: &dyn Target) {
        if self.find(at).is_some() || self.strangers >= MOST_STRANGERS {
            return;
        }
        self.read(target);
        if self.find(at).is_none() {
            self.strangers += 1;
        }
    }

    /// The module of an address, and the address in its file.
    pub(crate) fn find(&self, at: u64) -> Option<(&Arc<Module>, u64)> {
        let code = self.code.iter().find(|code| (code.start..code.end).contains(&at))?;
        Some((&code.module, at.wrapping_sub(code.bias)))
    }

    /// Reads all mappings anew: libraries come and go.
    fn read(&mut self, target: &dyn Target) {
        let strangers = self.strangers;
        *self = Self { strangers, ..Self::default() };
        let mut files = HashMap::new();
        for mapping in target.mappings().into_iter().filter(|mapping| mapping.executable) {
            let file =
                files.entry(mapping.path.clone()).or_insert_with(|| Tables::read(&mapping.path));
            if let Some(tables) = file {
                self.add(&mapping, tables);
            }
        }
    }

    fn add(&mut self, mapping: &Mapping, tables: &Tables) {
        let Some(bias) = tables.bias(mapping) else { return };
        let module = Arc::new(Module { path: mapping.path.clone(), name: mapping.name.clone() });
        let (start, end) = (mapping.start, mapping.end);
        self.unwinder.add_module(Unwindable::new(
            mapping.name.clone(),
            start..end,
            bias,
            tables.sections(),
        ));
        self.code.push(Code { start, end, bias, module });
    }
}

/// What unwinding needs of a file.
struct Tables {
    /// File offset, size in the file and address of each loadable segment.
    segments: Vec<(u64, u64, u64)>,
    text: Option<Section>,
    got: Option<Section>,
    eh_frame: Option<Section>,
    eh_frame_hdr: Option<Section>,
    debug_frame: Option<Section>,
}

/// A section: its address, and its bytes where they are needed.
#[derive(Clone)]
struct Section {
    start: u64,
    len: u64,
    bytes: Vec<u8>,
}

impl Section {
    fn range(&self) -> std::ops::Range<u64> {
        self.start..self.start.saturating_add(self.len)
    }
}

impl Tables {
    fn read(path: &Path) -> Option<Self> {
        let cache = ReadCache::new(File::open(path).ok()?);
        let file = object::File::parse(&cache).ok()?;
        let section = |name: &str, bytes: bool| {
            let section = file.section_by_name(name)?;
            let bytes =
                if bytes { section.uncompressed_data().ok()?.into_owned() } else { Vec::new() };
            Some(Section { start: section.address(), len: section.size(), bytes })
        };
        let segments = file.segments().map(|segment| {
            let (offset, size) = segment.file_range();
            (offset, size, segment.address())
        });
        Some(Self {
            segments: segments.collect(),
            text: section(".text", false),
            got: section(".got", false),
            eh_frame: section(".eh_frame", true),
            eh_frame_hdr: section(".eh_frame_hdr", true),
            debug_frame: section(".debug_frame", true),
        })
    }

    /// By how much addresses of the file are moved in a mapping of it.
    fn bias(&self, mapping: &Mapping) -> Option<u64> {
        // A mapping begins at a page boundary, perhaps before the segment does.
        let last = mapping.offset.checked_add(mapping.end.checked_sub(mapping.start)?)?;
        let (offset, _, address) = self.segments.iter().find(|(offset, size, _)| {
            *offset < last && offset.saturating_add(*size) > mapping.offset
        })?;
        let in_file = address.wrapping_sub(*offset).wrapping_add(mapping.offset);
        Some(mapping.start.wrapping_sub(in_file))
    }

    fn sections(&self) -> ExplicitModuleSectionInfo<Vec<u8>> {
        let range = |section: &Option<Section>| section.as_ref().map(Section::range);
        let bytes = |section: &Option<Section>| section.as_ref().map(|it| it.bytes.clone());
        ExplicitModuleSectionInfo {
            base_svma: 0,
            text_svma: range(&self.text),
            got_svma: range(&self.got),
            eh_frame_svma: range(&self.eh_frame),
            eh_frame: bytes(&self.eh_frame),
            eh_frame_hdr_svma: range(&self.eh_frame_hdr),
            eh_frame_hdr: bytes(&self.eh_frame_hdr),
            debug_frame: bytes(&self.debug_frame),
            ..ExplicitModuleSectionInfo::default()
        }
    }
}
