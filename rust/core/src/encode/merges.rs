//! The rules, arranged for finding which of them apply.

use std::sync::atomic::{AtomicU8, Ordering};

use rustc_hash::FxHashSet;

use crate::grid::Offset;
use crate::vocabulary::{MergeMode, Rule, Vocabulary};

/// A vocabulary's rules, by number, and the ways to them: from two neighbouring cells, and from a token that has just
/// appeared.
#[derive(Debug)]
pub(crate) struct Rules {
    pub base_vocab_size: u32,
    pub merge_mode: MergeMode,
    pairs: Vec<Pair>,
    /// The rules that join a merged token to one that is not newer, ordered by the merged token.
    partners: Vec<u32>,
    base: BaseTable,
    /// Oriented mode, per rule: whether its two shapes touch. Found out when first needed.
    touching: Vec<AtomicU8>,
}

/// What a rule joins.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pair {
    pub a: u32,
    pub b: u32,
    pub offset: Offset,
    /// Numbers of cells of a and b, at most `u32::MAX`.
    pub size_a: u32,
    pub size_b: u32,
    /// The partners of the rule's own token: the first of them, and how many there are.
    first_partner: u32,
    num_partners: u32,
}

impl Rules {
    pub fn new(vocabulary: &Vocabulary) -> Self {
        let k = vocabulary.base_vocab_size();
        let rules = vocabulary.rules();
        let sizes = vocabulary.merged_sizes();
        let size = |token: u32| {
            let size = token.checked_sub(k).map_or(1, |rule| sizes[rule as usize]);
            u32::try_from(size).unwrap_or(u32::MAX)
        };

        let newer = |rule: &Rule| rule.a.max(rule.b);
        let mut merged: Vec<u32> =
            (0..).zip(rules).filter(|(_, rule)| newer(rule) >= k).map(|(index, _)| index).collect();
        merged.sort_by_key(|&index| newer(&rules[index as usize]));
        let mut pairs: Vec<Pair> = rules
            .iter()
            .map(|rule| {
                let offset = rule.offset.unwrap_or(Offset { dy: 0, dx: 0 });
                let Rule { a, b, .. } = *rule;
                Pair { a, b, offset, size_a: size(a), size_b: size(b), first_partner: 0, num_partners: 0 }
            })
            .collect();
        for (position, &index) in (0..).zip(&merged) {
            let pair = &mut pairs[(newer(&rules[index as usize]) - k) as usize];
            if pair.num_partners == 0 {
                pair.first_partner = position;
            }
            pair.num_partners += 1;
        }
        Self {
            base_vocab_size: k,
            merge_mode: vocabulary.merge_mode(),
            partners: merged,
            base: BaseTable::new(k, rules),
            touching: rules.iter().map(|_| AtomicU8::new(UNKNOWN)).collect(),
            pairs,
        }
    }

    /// Number of rules.
    pub fn len(&self) -> usize {
        self.pairs.len()
    }

    pub fn pair(&self, rule: u32) -> &Pair {
        &self.pairs[rule as usize]
    }

    /// The token that a rule makes.
    pub fn token(&self, rule: u32) -> u32 {
        self.base_vocab_size + rule
    }

    /// The rules that join a pair's token to tokens that are not newer.
    pub fn partners(&self, pair: &Pair) -> &[u32] {
        &self.partners[pair.first_partner as usize..][..pair.num_partners as usize]
    }

    /// The table for neighbouring cells.
    pub fn base(&self) -> &BaseTable {
        &self.base
    }

    /// The cells of a token, seen from its anchor, those of `a` before those of `b` (oriented mode).
    ///
    /// To be asked only of tokens that a grid contains; others may have more cells than there is memory.
    pub fn cells(&self, token: u32) -> impl Iterator<Item = Offset> + '_ {
        let mut pending = vec![(token, Offset { dy: 0, dx: 0 })];
        std::iter::from_fn(move || {
            let (mut token, at) = pending.pop()?;
            while let Some(rule) = token.checked_sub(self.base_vocab_size) {
                let Pair { a, b, offset, .. } = *self.pair(rule);
                pending.push((b, Offset { dy: at.dy + offset.dy, dx: at.dx + offset.dx }));
                token = a;
            }
            Some(at)
        })
    }

    /// Oriented mode: whether two regions with a rule's tokens at its offset are adjacent, in a grid of so many cells.
    /// Their shapes decide it, so it is found out once, when a grid that both fit into has one of them.
    pub fn touches(&self, rule: u32, cells: usize) -> bool {
        let known = &self.touching[rule as usize];
        // Two threads may both find out; they find the same.
        if known.load(Ordering::Relaxed) == UNKNOWN {
            let Pair { a, b, size_a, size_b, offset: Offset { dy, dx }, .. } = *self.pair(rule);
            if size_a as usize + size_b as usize > cells {
                return false;
            }
            let first: FxHashSet<Offset> = self.cells(a).collect();
            let beside = |cell: Offset| {
                [(0, 1), (0, -1), (1, 0), (-1, 0)].into_iter().any(|(down, right)| {
                    first.contains(&Offset { dy: cell.dy + dy + down, dx: cell.dx + dx + right })
                })
            };
            let found = if self.cells(b).any(beside) { YES } else { NO };
            known.store(found, Ordering::Relaxed);
        }
        known.load(Ordering::Relaxed) == YES
    }
}

const UNKNOWN: u8 = 0;
const YES: u8 = 1;
const NO: u8 = 2;

/// How two neighbouring cells lie, where rules tell it apart.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Beside {
    Right = 0,
    Below = 1,
}

/// From two neighbouring cells to the rule that joins their ids. Most neighbours have none, and a filter small enough
/// for the first-level cache says so at once.
#[derive(Debug)]
pub(crate) struct BaseTable {
    /// One bit per hash of a pair: a pair whose bit is not set has no rule.
    filter: Box<[u64; FILTER_WORDS]>,
    /// Open addressing: a rule stands at the first free place after where its pair's hash points.
    places: Vec<Place>,
    place_shift: u32,
    /// In pair mode both ways of lying are looked up as one.
    mask: u32,
}

const FILTER_WORDS: usize = 1 << 11;

#[derive(Debug, Clone, Copy)]
struct Place {
    /// Of the two ids and how they lie.
    key: u64,
    rule: u32,
}

/// The key where no rule is; ids are smaller.
const FREE: u64 = u64::MAX;

impl BaseTable {
    fn new(base_vocab_size: u32, rules: &[Rule]) -> Self {
        let base: Vec<_> = (0..)
            .zip(rules)
            .filter(|(_, rule)| rule.a.max(rule.b) < base_vocab_size)
            .filter_map(|(index, rule)| {
                let beside = match rule.offset {
                    None | Some(Offset { dy: 0, dx: 1 }) => Beside::Right,
                    Some(Offset { dy: 1, dx: 0 }) => Beside::Below,
                    // Cells at other offsets are not adjacent.
                    Some(_) => return None,
                };
                Some((index, rule, beside))
            })
            .collect();
        let place_bits = base.len().next_power_of_two().ilog2() + 1;
        let mut table = Self {
            filter: Box::new([0; FILTER_WORDS]),
            places: vec![Place { key: FREE, rule: 0 }; 1 << place_bits],
            place_shift: 64 - place_bits,
            mask: base.iter().any(|(_, rule, _)| rule.offset.is_some()).into(),
        };
        for (rule, Rule { a, b, .. }, beside) in base {
            let key = table.key(*a, *b, beside);
            let (word, bit) = filter_place(key);
            table.filter[word] |= 1 << bit;
            let mut place = table.first_place(key);
            while table.places[place].key != FREE {
                place = table.next_place(place);
            }
            table.places[place] = Place { key, rule };
        }
        table
    }

    /// 0 for most of the pairs that no rule joins, otherwise 1.
    #[inline]
    pub fn may_join(&self, a: u32, b: u32, beside: Beside) -> u64 {
        let (word, bit) = filter_place(self.key(a, b, beside));
        self.filter[word] >> bit & 1
    }

    /// The rule that joins two neighbouring cells.
    #[inline]
    pub fn get(&self, a: u32, b: u32, beside: Beside) -> Option<u32> {
        let key = self.key(a, b, beside);
        let mut index = self.first_place(key);
        loop {
            let place = &self.places[index];
            if place.key == key {
                return Some(place.rule);
            }
            if place.key == FREE {
                return None;
            }
            index = self.next_place(index);
        }
    }

    fn key(&self, a: u32, b: u32, beside: Beside) -> u64 {
        (u64::from(a) << 33) + (u64::from(b) << 1) + u64::from(beside as u32 & self.mask)
    }

    fn first_place(&self, key: u64) -> usize {
        (hash(key) >> self.place_shift) as usize
    }

    fn next_place(&self, place: usize) -> usize {
        (place + 1) & (self.places.len() - 1)
    }
}

fn filter_place(key: u64) -> (usize, u64) {
    let bit = hash(key) >> (64 - FILTER_WORDS.ilog2() - 6);
    ((bit / 64) as usize, bit % 64)
}

/// The high bits are spread well.
fn hash(key: u64) -> u64 {
    key.wrapping_mul(0xD6E8_FEB8_6659_FD93)
}
