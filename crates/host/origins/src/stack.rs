//! Walking the frames of a stopped thread.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use framehop::Unwinder;
use framehop::x86_64::UnwindRegsX86_64;

use crate::module::{Module, Modules};
use crate::target::{Registers, Target};

/// Most frames of one stack.
const MOST_FRAMES: usize = 64;

/// Words of the stack in which a saved frame pointer is looked for.
const WINDOW: usize = 512;

/// Frame pointers that are tried.
const MOST_TRIES: usize = 8;

/// A frame pointer that points to no stack. Zero would, at the end of one.
const NOWHERE: u64 = 0xbad0_0000_0000_0008;

const PAGE: usize = 4096;
const PAGE_MASK: u64 = 4095;

/// One frame: an address in a file.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Frame {
    pub(crate) module: Arc<Module>,
    /// The address that the file gives to the instruction, or to the call for an outer frame.
    pub(crate) address: u64,
}

/// The frames of a thread, innermost first.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct Stack(Arc<[Frame]>);

impl Stack {
    /// The frames, innermost first.
    pub fn frames(&self) -> &[Frame] {
        &self.0
    }
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{:#x}", self.module.name, self.address)
    }
}

impl fmt::Debug for Stack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.frames()).finish()
    }
}

/// A walk: addresses to look up, and whether it came to the end of the stack.
#[derive(Default)]
struct Walk {
    addresses: Vec<u64>,
    complete: bool,
}

/// The frames of a thread.
///
/// From outside only the instruction and the stack pointer are known. The frame pointer matters where
/// a function addresses its frame by it before a callee has saved it; then it is guessed: it points to
/// the place where such a function saved its caller's, right below the return address.
pub(crate) fn unwind(modules: &mut Modules, target: &dyn Target, registers: Registers) -> Stack {
    let mut memory = Memory { target, pages: HashMap::new() };
    modules.look_for(registers.ip, target);
    let mut best = walk(modules, &mut memory, registers, NOWHERE);
    if !best.complete {
        let mut tries = 0;
        for at in (registers.sp..).step_by(8).take(WINDOW) {
            let Some(candidate) = frame_pointer(modules, &mut memory, at) else { continue };
            let found = walk(modules, &mut memory, registers, candidate);
            if found.complete && !best.complete || found.addresses.len() > best.addresses.len() {
                best = found;
            }
            tries += 1;
            if best.complete || tries == MOST_TRIES {
                break;
            }
        }
    }
    let frames = best.addresses.into_iter().filter_map(|at| {
        let (module, address) = modules.find(at)?;
        Some(Frame { module: Arc::clone(module), address })
    });
    Stack(frames.collect())
}

fn walk(modules: &mut Modules, memory: &mut Memory<'_>, registers: Registers, bp: u64) -> Walk {
    let mut found = Walk::default();
    {
        let regs = UnwindRegsX86_64::new(registers.ip, registers.sp, bp);
        let mut read = |at| memory.word(at).ok_or(());
        let Modules { unwinder, cache, .. } = modules;
        let mut frames = unwinder.iter_frames(registers.ip, regs, cache, &mut read);
        while found.addresses.len() < MOST_FRAMES {
            match frames.next() {
                Ok(Some(frame)) => found.addresses.push(frame.address_for_lookup()),
                Ok(None) => {
                    found.complete = true;
                    break;
                }
                Err(_) => break,
            }
        }
    }
    // An address that is no code ends the walk where it stands.
    let known = found.addresses.iter().take_while(|at| modules.find(**at).is_some()).count();
    found.complete &= known == found.addresses.len();
    found.addresses.truncate(known);
    found
}

/// The address `at`, if a caller's frame pointer and a return address may be saved there.
fn frame_pointer(modules: &Modules, memory: &mut Memory<'_>, at: u64) -> Option<u64> {
    let saved = memory.word(at)?;
    let outer = saved == 0 || saved == 1 || saved > at && saved - at < 1 << 20;
    let returns = memory.word(at.checked_add(8)?)?;
    (outer && modules.find(returns.wrapping_sub(1)).is_some()).then_some(at)
}

/// The stack, read a page at a time.
struct Memory<'a> {
    target: &'a dyn Target,
    pages: HashMap<u64, Option<Box<[u8; PAGE]>>>,
}

impl Memory<'_> {
    fn word(&mut self, at: u64) -> Option<u64> {
        let (page, offset) = (at & !PAGE_MASK, usize::try_from(at & PAGE_MASK).ok()?);
        let target = self.target;
        let bytes = self.pages.entry(page).or_insert_with(|| {
            let mut bytes = Box::new([0; PAGE]);
            target.read(page, &mut bytes[..]).then_some(bytes)
        });
        let word = bytes.as_ref()?.get(offset..)?.first_chunk()?;
        Some(u64::from_le_bytes(*word))
    }
}
