//! Runs of entries: written and tested several at a time, always by single 64-bit accesses.

use core::sync::atomic::Ordering;

use lychgate_types::sync::AtomicU64;

const UNROLL: usize = 16;

/// The entry in a word of a table.
#[inline(always)]
pub(crate) fn load(word: &AtomicU64) -> u64 {
    // Pairs with the release of `publish`: who finds a table finds it filled.
    u64::from_le(word.load(Ordering::Acquire))
}

#[inline(always)]
pub(crate) fn store(word: &AtomicU64, entry: u64) {
    word.store(entry.to_le(), Ordering::Relaxed);
}

/// Puts `entry` where nothing is; gives what was there if that was not so.
pub(crate) fn publish(word: &AtomicU64, entry: u64) -> Result<(), u64> {
    word.compare_exchange(0, entry.to_le(), Ordering::Release, Ordering::Acquire)
        .map(|_| ())
        .map_err(u64::from_le)
}

/// Puts `new` where `old` is, with all that was stored before for whoever finds it; gives whether it
/// still was there.
pub(crate) fn exchange(word: &AtomicU64, old: u64, new: u64) -> bool {
    word.compare_exchange(old.to_le(), new.to_le(), Ordering::Release, Ordering::Relaxed).is_ok()
}

/// Stores `first`, `first + step`, and so on.
#[inline(always)]
pub(crate) fn fill(words: &[AtomicU64], first: u64, step: u64) {
    if let [word] = words {
        return store(word, first);
    }
    let mut entry = first;
    let (chunks, rest) = words.as_chunks::<UNROLL>();
    for chunk in chunks {
        for (word, steps) in chunk.iter().zip(0u64..) {
            store(word, entry.wrapping_add(step.wrapping_mul(steps)));
        }
        entry = entry.wrapping_add(step.wrapping_mul(UNROLL as u64));
    }
    for word in rest {
        store(word, entry);
        entry = entry.wrapping_add(step);
    }
}

/// Whether every word is 0.
#[inline(always)]
pub(crate) fn all_clear(words: &[AtomicU64]) -> bool {
    if let [word] = words {
        return word.load(Ordering::Relaxed) == 0;
    }
    let (chunks, rest) = words.as_chunks::<UNROLL>();
    // Several lanes, so that no load waits for the one before.
    let mut lanes = [0; 4];
    for chunk in chunks {
        for part in chunk.as_chunks::<4>().0 {
            for (lane, word) in lanes.iter_mut().zip(part) {
                *lane |= word.load(Ordering::Relaxed);
            }
        }
    }
    let rest = rest.iter().fold(0, |all, word| all | word.load(Ordering::Relaxed));
    lanes.iter().fold(rest, |all, lane| all | lane) == 0
}

/// How many words from the start on have `value` under `mask`.
#[inline(always)]
pub(crate) fn count_matching(words: &[AtomicU64], mask: u64, value: u64) -> usize {
    let (mask, value) = (mask.to_le(), value.to_le());
    let (chunks, _) = words.as_chunks::<UNROLL>();
    let mut same = 0;
    for chunk in chunks {
        let all_match = if mask == value {
            let all = chunk.iter().fold(mask, |all, word| all & word.load(Ordering::Relaxed));
            all == mask
        } else {
            let differs = |any, word: &AtomicU64| any | (word.load(Ordering::Relaxed) ^ value);
            chunk.iter().fold(0, differs) & mask == 0
        };
        if !all_match {
            break;
        }
        same += UNROLL;
    }
    let rest = words.get(same..).unwrap_or(&[]);
    let matches = |word: &&AtomicU64| word.load(Ordering::Relaxed) & mask == value;
    same + rest.iter().take_while(matches).count()
}

/// Clears the words from the start on that have `value` under `mask`; gives how many. As [`count_matching`]
/// and [`fill`] one after the other, but loads and stores overlap.
#[inline(always)]
pub(crate) fn clear_matching(words: &[AtomicU64], mask: u64, value: u64) -> usize {
    let (chunks, _) = words.as_chunks::<UNROLL>();
    let mut done = 0;
    for chunk in chunks {
        if count_matching(chunk, mask, value) != UNROLL {
            break;
        }
        for word in chunk {
            store(word, 0);
        }
        done += UNROLL;
    }
    let rest = words.get(done..).unwrap_or(&[]);
    let more = count_matching(rest, mask, value);
    for word in rest.iter().take(more) {
        store(word, 0);
    }
    done + more
}

/// Replaces an entry that hardware or another thread may be changing by what `new` makes of
/// it; gives whether it made something.
pub(crate) fn update(word: &AtomicU64, new: impl Fn(u64) -> Option<u64>) -> bool {
    word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |entry| {
        new(u64::from_le(entry)).map(u64::to_le)
    })
    .is_ok()
}
