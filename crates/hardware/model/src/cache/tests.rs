use std::collections::HashMap;

use proptest::prelude::*;

use super::stores::Forever;
use super::*;

const POLICIES: [Policy; 3] = [Policy::Plain, Policy::Adversarial, Policy::EvictRandom(0x5eed)];

#[test]
fn a_hit_is_the_smallest_span_around_the_address() {
    for policy in [Policy::Plain, Policy::Adversarial] {
        let cache = Cache::new(policy, 64);
        cache.insert(1u16, Span::around(0x20_0000, 21), "large");
        cache.insert(1, Span::around(0x20_3000, 12), "small");
        assert_eq!(cache.lookup(1, 0x20_3fff), Some((Span::around(0x20_3000, 12), "small")));
        assert_eq!(cache.lookup(1, 0x20_4000).map(|hit| hit.1), Some("large"));
        assert_eq!(cache.lookup(1, 0x40_0000), None);
        assert_eq!(cache.lookup(2, 0x20_3000), None);
    }
}

#[test]
fn an_invalidation_takes_every_span_that_meets_it_and_no_other() {
    for policy in [Policy::Plain, Policy::Adversarial] {
        let cache = Cache::new(policy, 256);
        cache.insert(7u16, Span::around(0, 30), 0);
        cache.insert(7, Span::around(0x1000, 12), 1);
        cache.insert(7, Span::around(0x2000, 12), 2);
        cache.insert(8, Span::around(0x1000, 12), 3);
        cache.invalidate(7, 0x1fff, 0x1fff);
        assert_eq!(cache.lookup(7, 0x1000), None);
        assert_eq!(cache.lookup(7, 0x2000).map(|hit| hit.1), Some(2));
        assert_eq!(cache.lookup(8, 0x1000).map(|hit| hit.1), Some(3));
        cache.invalidate(7, 0, u64::MAX);
        assert_eq!(cache.len(), 1);
    }
}

#[test]
fn a_visit_follows_the_addresses_until_a_gap_or_a_refusal() {
    for policy in [Policy::Plain, Policy::Adversarial] {
        let cache = Cache::new(policy, 64);
        cache.insert(1u16, Span::around(0x1000, 12), 1);
        cache.insert(1, Span::around(0x2000, 13), 2);
        cache.insert(1, Span::around(0x4000, 12), 4);
        cache.insert(1, Span::around(0x6000, 12), 6);
        let visit = |first, last, until| {
            let mut seen = Vec::new();
            let rest = cache.visit(1, first, last, |_, &value| {
                let go_on = value != until;
                if go_on {
                    seen.push(value);
                }
                go_on
            });
            (seen, rest)
        };
        assert_eq!(visit(0x1800, 0x4000, 0), (vec![1, 2, 4], None));
        assert_eq!(visit(0x1800, 0x6000, 0), (vec![1, 2, 4], Some(0x5000)));
        assert_eq!(visit(0x1800, 0x4000, 4), (vec![1, 2], Some(0x4000)));
        assert_eq!(visit(0x3fff, 0x3fff, 0), (vec![2], None));
        assert_eq!(visit(0, 0x3fff, 0), (vec![], Some(0)));
    }
}

#[test]
fn spans_at_the_ends_of_the_address_space_work() {
    for policy in [Policy::Plain, Policy::Adversarial] {
        let cache = Cache::new(policy, 64);
        cache.insert((), Span::around(u64::MAX, 12), 1);
        cache.insert((), Span::around(0, 64), 2);
        assert_eq!(cache.lookup((), u64::MAX).map(|hit| hit.1), Some(1));
        assert_eq!(cache.lookup((), 5).map(|hit| hit.1), Some(2));
        cache.invalidate((), u64::MAX, u64::MAX);
        assert!(cache.is_empty());
    }
}

#[test]
fn plain_evicts_and_stays_within_its_size() {
    let cache = Cache::new(Policy::Plain, 64);
    for page in 0..1000u64 {
        cache.insert(0u16, Span::around(page << 12, 12), page);
        assert_eq!(cache.lookup(0, page << 12).map(|hit| hit.1), Some(page));
    }
    assert!(cache.len() <= 64);
    cache.clear();
    assert_eq!(cache.len(), 0);
    assert_eq!(cache.lookup(0, 999 << 12), None);
}

#[test]
fn adversarial_keeps_everything() {
    let cache = Cache::new(Policy::Adversarial, 4);
    for page in 0..10_000u64 {
        cache.insert((page % 3) as u32, Span::around(page << 12, 12), page);
    }
    assert!((0..10_000).all(|page| cache.lookup((page % 3) as u32, page << 12).is_some()));
}

#[test]
fn adversarial_halves_itself_at_its_bound() {
    let mut store = Store::Forever(Forever::new(100));
    for page in 0..1000u64 {
        store.insert(page % 2, Span::around(page << 12, 12), page);
        assert!(store.len() <= 100);
        assert!(store.lookup(page % 2, page << 12).is_some());
    }
    assert!(store.len() >= 50);
}

#[test]
fn evict_random_forgets_some_hits_and_the_seed_decides_which() {
    let run = |seed| {
        let cache = Cache::new(Policy::EvictRandom(seed), 64);
        (0..1000)
            .map(|_| {
                let hit = cache.lookup(0u8, 0).is_some();
                cache.insert(0, Span::around(0, 12), ());
                hit
            })
            .collect::<Vec<_>>()
    };
    let hits = run(1).into_iter().filter(|&hit| hit).count();
    assert!((800..999).contains(&hits), "{hits}");
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

#[derive(Clone, Debug)]
enum Op {
    Insert(u8, u64, u8, u32),
    Invalidate(u8, u64, u64),
    Lookup(u8, u64),
    DropTag(u8),
    Clear,
}

fn op() -> impl Strategy<Value = Op> {
    let at = prop_oneof![0..0x40_0000u64, any::<u64>()];
    let order = prop_oneof![Just(12u8), Just(13), Just(21), 0..=64u8];
    prop_oneof![
        8 => (0..3u8, at.clone(), order, any::<u32>()).prop_map(|(t, a, o, v)| Op::Insert(t, a, o, v)),
        8 => (0..3u8, at.clone()).prop_map(|(t, a)| Op::Lookup(t, a)),
        3 => (0..3u8, at.clone(), at).prop_map(|(t, a, b)| Op::Invalidate(t, a.min(b), a.max(b))),
        1 => (0..3u8).prop_map(Op::DropTag),
        1 => Just(Op::Clear),
    ]
}

proptest! {
    /// A hit is always what was last inserted and not invalidated since; `Adversarial` moreover
    /// hits whenever the reference does.
    #[test]
    fn every_policy_agrees_with_a_plain_map(ops in prop::collection::vec(op(), 1..200)) {
        for policy in POLICIES {
            let cache = Cache::new(policy, 16);
            let mut reference: HashMap<(u8, Span), u32> = HashMap::new();
            for op in &ops {
                match *op {
                    Op::Insert(tag, at, order, value) => {
                        let span = Span::around(at, order);
                        cache.insert(tag, span, value);
                        reference.insert((tag, span), value);
                    }
                    Op::Invalidate(tag, first, last) => {
                        cache.invalidate(tag, first, last);
                        reference.retain(|(t, span), _| *t != tag || !span.intersects(first, last));
                    }
                    Op::Lookup(tag, at) => {
                        let hit = cache.lookup(tag, at);
                        let mut visited = None;
                        let rest = cache.visit(tag, at, at, |span, &value| {
                            visited = Some((span, value));
                            true
                        });
                        prop_assert_eq!(rest.is_none(), visited.is_some());
                        if !matches!(policy, Policy::EvictRandom(_)) {
                            prop_assert_eq!(visited, hit);
                        }
                        if let Some((span, value)) = hit {
                            prop_assert_eq!(reference.get(&(tag, span)), Some(&value));
                            prop_assert!(span.intersects(at, at));
                        }
                        if policy == Policy::Adversarial {
                            let best = reference
                                .iter()
                                .filter(|((t, span), _)| *t == tag && span.intersects(at, at))
                                .min_by_key(|((_, span), _)| span.order)
                                .map(|((_, span), value)| (*span, *value));
                            prop_assert_eq!(hit, best);
                        }
                    }
                    Op::DropTag(tag) => {
                        cache.retain(|t, _, _| t != tag);
                        reference.retain(|(t, _), _| *t != tag);
                    }
                    Op::Clear => {
                        cache.clear();
                        reference.clear();
                    }
                }
                prop_assert!(cache.len() <= reference.len());
            }
        }
    }
}
