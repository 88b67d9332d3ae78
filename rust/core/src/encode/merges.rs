//! A vocabulary's merges, indexed for finding which of them apply.

use std::sync::atomic::{AtomicU8, Ordering};

use rustc_hash::FxHashSet;

use crate::error::{Error, Result};
use crate::grid::Offset;
use crate::memory;
use crate::vocabulary::{Merge, MergeMode, Vocabulary};

/// A vocabulary's merges by number, and two ways to find them: by two neighbouring cells, and by a token that a merge
/// has just made.
#[derive(Debug)]
pub(super) struct MergeIndex {
    pub base_vocab_size: u32,
    pub merge_mode: MergeMode,
    entries: Vec<MergeEntry>,
    /// The merges of two tokens of which at least one is merged, ordered by the newer of the two tokens.
    by_newer_token: Vec<u32>,
    cell_merges: CellMergeTable,
    /// Oriented mode, per merge: whether its two shapes touch, worked out when first needed.
    touch_states: Vec<AtomicU8>,
}

/// One merge.
#[derive(Debug, Clone, Copy)]
pub(super) struct MergeEntry {
    pub a: u32,
    pub b: u32,
    /// In oriented mode, from a's anchor to b's.
    pub offset: Offset,
    /// Number of cells of a, at most `u32::MAX`.
    pub size_a: u32,
    /// Number of cells of b, at most `u32::MAX`.
    pub size_b: u32,
    /// Where the merges of this merge's own token with tokens that are not newer begin in `by_newer_token`.
    first_successor: u32,
    num_successors: u32,
}

/// What memory is for, in messages.
const INDEX: &str = "the index of the merges";

impl MergeIndex {
    pub fn new(vocabulary: &Vocabulary) -> Result<Self> {
        let k = vocabulary.base_vocab_size();
        let merges = vocabulary.merges();
        let sizes = vocabulary.merged_sizes()?;
        let size = |token: u32| {
            let size = token.checked_sub(k).map_or(1, |merge| sizes[merge as usize]);
            u32::try_from(size).unwrap_or(u32::MAX)
        };
        let entry = |&Merge { a, b, offset, .. }: &Merge| MergeEntry {
            a,
            b,
            offset: offset.unwrap_or(Offset { dy: 0, dx: 0 }),
            size_a: size(a),
            size_b: size(b),
            first_successor: 0,
            num_successors: 0,
        };
        let mut entries = memory::collect(merges.iter().map(entry), INDEX)?;

        // A merge can match for the first time when the newer of its two tokens has been made.
        let newer_token = |merge: u32| merges[merge as usize].a.max(merges[merge as usize].b);
        let joins_merged = (0..merges.len() as u32).filter(|&merge| newer_token(merge) >= k);
        let mut by_newer_token: Vec<u32> = memory::collect(joins_merged, INDEX)?;
        by_newer_token.sort_unstable_by_key(|&merge| (newer_token(merge), merge));
        for (position, &merge) in (0..).zip(&by_newer_token) {
            let entry = &mut entries[(newer_token(merge) - k) as usize];
            if entry.num_successors == 0 {
                entry.first_successor = position;
            }
            entry.num_successors += 1;
        }
        Ok(Self {
            base_vocab_size: k,
            merge_mode: vocabulary.merge_mode(),
            by_newer_token,
            cell_merges: CellMergeTable::new(k, merges)?,
            touch_states: memory::collect(merges.iter().map(|_| AtomicU8::new(TOUCH_UNKNOWN)), INDEX)?,
            entries,
        })
    }

    /// Number of merges.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn entry(&self, merge: u32) -> &MergeEntry {
        &self.entries[merge as usize]
    }

    /// The token that a merge makes.
    pub fn token(&self, merge: u32) -> u32 {
        self.base_vocab_size + merge
    }

    /// The merges of this merge's token with tokens that are not newer.
    pub fn successors(&self, entry: &MergeEntry) -> &[u32] {
        &self.by_newer_token[entry.first_successor as usize..][..entry.num_successors as usize]
    }

    /// The merges of two neighbouring cells.
    pub fn cell_merges(&self) -> &CellMergeTable {
        &self.cell_merges
    }

    /// The cells of a token, seen from its anchor, those of `a` before those of `b` (oriented mode).
    ///
    /// Only for tokens that a grid contains; others may have more cells than there is memory.
    pub fn cells(&self, token: u32) -> impl Iterator<Item = Offset> + '_ {
        // Depth first, a before b: a token is taken apart until it is a cell.
        let mut stack = vec![(token, Offset { dy: 0, dx: 0 })];
        std::iter::from_fn(move || {
            let (mut token, at) = stack.pop()?;
            while let Some(merge) = token.checked_sub(self.base_vocab_size) {
                let MergeEntry { a, b, offset, .. } = *self.entry(merge);
                stack.push((b, Offset { dy: at.dy + offset.dy, dx: at.dx + offset.dx }));
                token = a;
            }
            Some(at)
        })
    }

    /// Oriented mode: whether two regions with a merge's tokens at its offset are adjacent, in a grid of `cells` cells.
    ///
    /// Their shapes decide it, so it is worked out once, when a grid that both fit into has one of them.
    pub fn touches(&self, merge: u32, cells: usize) -> Result<bool> {
        let state = &self.touch_states[merge as usize];
        // If two threads work it out at the same time, both get the same result.
        if state.load(Ordering::Relaxed) == TOUCH_UNKNOWN {
            let MergeEntry { a, b, size_a, size_b, offset: Offset { dy, dx }, .. } = *self.entry(merge);
            if size_a as usize + size_b as usize > cells {
                return Ok(false);
            }
            // They touch if a cell of b, moved by the offset, is beside a cell of a.
            let mut cells_of_a = FxHashSet::<Offset>::default();
            let bytes = size_a as usize * size_of::<Offset>();
            let error = Error::Memory { bytes, purpose: "the cells of a token" };
            cells_of_a.try_reserve(size_a as usize).map_err(|_| error)?;
            cells_of_a.extend(self.cells(a));
            let is_beside_a = |cell: Offset| {
                [(0, 1), (0, -1), (1, 0), (-1, 0)].into_iter().any(|(down, right)| {
                    cells_of_a.contains(&Offset { dy: cell.dy + dy + down, dx: cell.dx + dx + right })
                })
            };
            let answer = if self.cells(b).any(is_beside_a) { TOUCH_YES } else { TOUCH_NO };
            state.store(answer, Ordering::Relaxed);
        }
        Ok(state.load(Ordering::Relaxed) == TOUCH_YES)
    }
}

const TOUCH_UNKNOWN: u8 = 0;
const TOUCH_YES: u8 = 1;
const TOUCH_NO: u8 = 2;

/// Where the second of two neighbouring cells lies.
#[derive(Debug, Clone, Copy)]
pub(super) enum Direction {
    Right = 0,
    Below = 1,
}

/// From two neighbouring cells to the merge of their ids. Most neighbours have none, and a filter small enough for the
/// first-level cache answers for them.
#[derive(Debug)]
pub(super) struct CellMergeTable {
    /// One bit per hash of a pair: a pair whose bit is not set has no merge.
    filter: Box<[u64; FILTER_WORDS]>,
    /// Open addressing: a merge is in the first free slot at or after the one that its pair's hash names.
    slots: Vec<Slot>,
    slot_shift: u32,
    /// 1 in oriented mode; 0 in pair mode, where both directions are looked up as one.
    direction_mask: u32,
}

const FILTER_WORDS: usize = 1 << 11;

#[derive(Debug, Clone, Copy)]
struct Slot {
    /// Of the two ids and their direction.
    key: u64,
    merge: u32,
}

/// The key of a free slot; keys of ids are smaller.
const FREE: u64 = u64::MAX;

impl CellMergeTable {
    fn new(base_vocab_size: u32, merges: &[Merge]) -> Result<Self> {
        let cell_merges = (0..)
            .zip(merges)
            .filter(|(_, merge)| merge.a.max(merge.b) < base_vocab_size)
            .filter_map(|(index, merge)| {
                let direction = match merge.offset {
                    None | Some(Offset { dy: 0, dx: 1 }) => Direction::Right,
                    Some(Offset { dy: 1, dx: 0 }) => Direction::Below,
                    // Cells at other offsets are not adjacent.
                    Some(_) => return None,
                };
                Some((index, merge, direction))
            });
        let cell_merges: Vec<(u32, &Merge, Direction)> = memory::collect(cell_merges, INDEX)?;
        // Twice as many slots as merges, so that a free one is near.
        let slot_bits = cell_merges.len().next_power_of_two().ilog2() + 1;
        let mut table = Self {
            filter: Box::new([0; FILTER_WORDS]),
            slots: memory::try_vec(1 << slot_bits, Slot { key: FREE, merge: 0 }, INDEX)?,
            slot_shift: 64 - slot_bits,
            direction_mask: cell_merges.iter().any(|(_, merge, _)| merge.offset.is_some()).into(),
        };
        for (merge, Merge { a, b, .. }, direction) in cell_merges {
            let key = table.key(*a, *b, direction);
            let (word, bit) = filter_bit(key);
            table.filter[word] |= 1 << bit;
            let mut slot = table.first_slot(key);
            while table.slots[slot].key != FREE {
                slot = table.next_slot(slot);
            }
            table.slots[slot] = Slot { key, merge };
        }
        Ok(table)
    }

    /// 0 for most of the pairs that have no merge, otherwise 1.
    #[inline]
    pub fn may_contain(&self, a: u32, b: u32, direction: Direction) -> u64 {
        let (word, bit) = filter_bit(self.key(a, b, direction));
        self.filter[word] >> bit & 1
    }

    /// The merge of two neighbouring cells.
    #[inline]
    pub fn get(&self, a: u32, b: u32, direction: Direction) -> Option<u32> {
        let key = self.key(a, b, direction);
        let mut index = self.first_slot(key);
        loop {
            let slot = &self.slots[index];
            if slot.key == key {
                return Some(slot.merge);
            }
            if slot.key == FREE {
                return None;
            }
            index = self.next_slot(index);
        }
    }

    fn key(&self, a: u32, b: u32, direction: Direction) -> u64 {
        (u64::from(a) << 33) + (u64::from(b) << 1) + u64::from(direction as u32 & self.direction_mask)
    }

    fn first_slot(&self, key: u64) -> usize {
        (hash(key) >> self.slot_shift) as usize
    }

    fn next_slot(&self, slot: usize) -> usize {
        (slot + 1) & (self.slots.len() - 1)
    }
}

/// The word and the bit of a key in the filter.
fn filter_bit(key: u64) -> (usize, u64) {
    let bit = hash(key) >> (64 - FILTER_WORDS.ilog2() - 6);
    ((bit / 64) as usize, bit % 64)
}

/// A hash whose high bits depend on all bits of the key.
fn hash(key: u64) -> u64 {
    key.wrapping_mul(0xD6E8_FEB8_6659_FD93)
}
