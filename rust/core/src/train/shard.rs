//! A shard: some of the grids, with lists of where the indexed pairs occur in them.

use std::ops::Range;

use super::canvas::{Canvas, Neighbours, Word};
use crate::encode::Encoding;
use crate::grid::Offset;
use crate::interrupt::Interrupt;
use crate::statistics::{key, tokens};

/// Cells whose pairs are counted together.
const PIECE: usize = 1 << 18;

/// Parts that pairs are divided into by their hash, so that what a part needs is found in the nearer caches.
const PARTS: usize = 64;

/// No region.
const NONE: u32 = u32::MAX;

/// Occurrences that are fetched at once.
const BLOCK: usize = 16;

/// One rule to apply.
#[derive(Clone, Copy)]
pub(super) struct Merge<'a> {
    /// Index of the rule's pair.
    pub pair: u32,
    pub a: u32,
    pub b: u32,
    pub offset: Option<Offset>,
    /// The new token.
    pub token: u32,
    /// Where the shard counts what it takes from other pairs.
    pub slots: &'a Slots,
}

/// Numbers the indexed pairs that contain `a` or `b` of a rule, so that they are found without hashing.
///
/// Slot 0 is for all pairs that are not indexed, and the last four are for pairs of `a` and `b` with the new token.
#[derive(Debug)]
pub(super) struct Slots {
    /// Per token t, the slots of (a, t), (t, a), (b, t), (t, b). If `a` is `b`, the first two alone count.
    table: Vec<[u32; 4]>,
    assigned: Vec<u32>,
    len: u32,
}

impl Slots {
    /// For tokens below `tokens`.
    pub fn new(tokens: u32) -> Self {
        Self { table: vec![[0; 4]; tokens as usize], assigned: Vec::new(), len: 0 }
    }

    /// Gives slots 1, 2, … to these pairs of tokens older than `token`, the new one.
    pub fn assign(&mut self, a: u32, b: u32, token: u32, keys: impl Iterator<Item = u64>) {
        let Self { table, assigned, len } = self;
        for token in assigned.drain(..) {
            table[token as usize] = [0; 4];
        }
        *len = 1;
        for key in keys {
            let (first, second) = tokens(key);
            for (side, applies, other) in [
                (0, first == a, second),
                (1, second == a, first),
                (2, first == b, second),
                (3, second == b, first),
            ] {
                if applies {
                    table[other as usize][side] = *len;
                    assigned.push(other);
                }
            }
            *len += 1;
        }
        table[token as usize] = [*len, *len + 1, *len + 2, *len + 3];
        assigned.push(token);
        *len += 4;
    }

    fn of(&self, token: u32) -> &[u32; 4] {
        &self.table[token as usize]
    }
}

/// A pair that is counted exactly.
#[derive(Debug)]
struct Counted {
    key: u64,
    /// The pair before it that is found at the same place.
    before: u32,
    count: u64,
    /// Anchors of its first regions.
    occurrences: Vec<u32>,
}

/// Some of the grids.
#[derive(Debug)]
pub(super) struct Shard<W> {
    canvas: Canvas<W>,
    /// Per indexed pair, the anchors of the first regions of its occurrences, and some where it no longer occurs. An
    /// anchor is out of date when it has another token: a region's token never comes back.
    occurrences: Vec<Vec<u32>>,
    counted: Vec<Counted>,
    /// After a rule, per slot, how many adjacent pairs are gone.
    removed: Vec<u32>,
    /// After a rule, the adjacencies of the new token: which pair, and the anchor of its first region.
    adjacencies: Vec<(NewPair, u32)>,
    /// How many of those count.
    num_adjacencies: usize,
    /// After a rule, the pairs with the new token, each once, and their counts.
    added: Vec<(NewPair, u32)>,
    /// A number per token and side; all 0 between calls.
    scratch: Vec<[u32; 2]>,
    offsets: Vec<(Offset, u64)>,
    of_x: Neighbours,
    of_y: Neighbours,
    partners: Vec<u32>,
}

/// A pair of the new token with token t: (new, t) is 2t and (t, new) is 2t + 1.
pub(super) type NewPair = u32;

/// The key of such a pair.
pub(super) fn new_key(new: u32, pair: NewPair) -> u64 {
    if pair & 1 == 0 { key(new, pair >> 1) } else { key(pair >> 1, new) }
}

impl<W: Word> Shard<W> {
    /// No grids, for tokens below `tokens`.
    pub fn new(tokens: u32) -> Self {
        Self {
            canvas: Canvas::default(),
            occurrences: Vec::new(),
            counted: Vec::new(),
            removed: Vec::new(),
            adjacencies: Vec::new(),
            num_adjacencies: 0,
            added: Vec::new(),
            scratch: vec![[0; 2]; tokens as usize],
            offsets: Vec::new(),
            of_x: Neighbours::default(),
            of_y: Neighbours::default(),
            partners: Vec::new(),
        }
    }

    /// Makes room for exactly this many cells.
    pub fn reserve(&mut self, cells: u64) {
        self.canvas.reserve(cells as usize);
    }

    /// Adds an empty grid and returns where it is.
    pub fn push(&mut self, height: u32, width: u32) -> u32 {
        self.canvas.push(height, width)
    }

    /// Fills a grid of this width, every cell a region of its own.
    pub fn set(&mut self, position: u32, width: u32, ids: &[u32]) {
        for (start, row) in (position..).step_by(width as usize + 1).zip(ids.chunks_exact(width as usize)) {
            self.canvas.set_row(start, row);
        }
    }

    /// Fills a grid of this width with the regions that it was encoded to.
    pub fn set_encoded(&mut self, position: u32, width: u32, encoding: &Encoding) {
        let Some(regions) = &encoding.regions else { return };
        let mut anchors = vec![None; encoding.ids.len()];
        let rows = (position..).step_by(width as usize + 1).zip(regions.tokens.chunks_exact(width as usize));
        for (p, &index) in rows.flat_map(|(start, row)| (start..).zip(row)) {
            let token = encoding.ids[index as usize];
            match anchors[index as usize] {
                None => {
                    self.canvas.set_row(p, &[token]);
                    anchors[index as usize] = Some(p);
                }
                Some(anchor) => self.canvas.join(anchor, p, token),
            }
        }
    }

    /// Counts all pairs by a hash of 2^`bits` values: upper bounds of their counts.
    pub fn sketch(&self, bits: u32, interrupt: &Interrupt) -> Vec<u32> {
        let mut sketch = vec![0_u32; 1 << bits];
        let mut parts = [const { Vec::new() }; PARTS];
        for range in ranges(&self.canvas) {
            if interrupt.is_set() {
                break;
            }
            self.canvas.for_each_pair(range.start, range.end, |_, a, b| {
                let hash = hash(key(a, b));
                parts[part(hash)].push((hash >> (u64::BITS - bits)) as u32);
            });
            for part in &mut parts {
                part.drain(..).for_each(|place| sketch[place as usize] += 1);
            }
        }
        sketch
    }

    /// Counts exactly those pairs whose bound reaches the threshold, and notes where they occur. There are `shards`.
    pub fn count(
        &mut self,
        shards: usize,
        sketch: &[u32],
        bits: u32,
        threshold: u64,
        interrupt: &Interrupt,
    ) -> Vec<(u64, u64)> {
        self.occurrences = Vec::new();
        let counted = &mut self.counted;
        let mut last = vec![NONE; sketch.len()];
        let mut parts = [const { Vec::new() }; PARTS];
        for range in ranges(&self.canvas) {
            if interrupt.is_set() {
                break;
            }
            self.canvas.for_each_pair(range.start, range.end, |x, a, b| {
                let key = key(a, b);
                parts[part(hash(key))].push((key, x));
            });
            for (key, x) in parts.iter_mut().flat_map(|part| part.drain(..)) {
                let place = (hash(key) >> (u64::BITS - bits)) as usize;
                let bound = sketch[place];
                if u64::from(bound) < threshold {
                    continue;
                }
                let mut number = last[place];
                while number != NONE && counted[number as usize].key != key {
                    number = counted[number as usize].before;
                }
                if number == NONE {
                    number = counted.len() as u32;
                    let before = std::mem::replace(&mut last[place], number);
                    let occurrences = Vec::with_capacity(bound as usize / shards);
                    counted.push(Counted { key, before, count: 0, occurrences });
                }
                let Counted { count, occurrences, .. } = &mut counted[number as usize];
                *count += 1;
                if occurrences.last() != Some(&x) {
                    occurrences.push(x);
                }
            }
        }
        counted.iter().map(|pair| (pair.key, pair.count)).collect()
    }

    /// Makes what was counted the new lists, given the pairs that were taken up, in order, their index being their place.
    pub fn index_counted(&mut self, keys: &[u64]) {
        self.occurrences.resize_with(keys.len(), Vec::new);
        for Counted { key, occurrences, .. } in self.counted.drain(..) {
            if let Ok(pair) = keys.binary_search(&key) {
                self.occurrences[pair] = occurrences;
            }
        }
    }

    /// Gives up a pair's list.
    pub fn forget(&mut self, pair: u32) {
        if let Some(list) = self.occurrences.get_mut(pair as usize) {
            *list = Vec::new();
        }
    }

    /// A pair's list, in raster order and without what occurs twice, taken out.
    fn take_list(&mut self, pair: u32) -> Vec<u32> {
        let mut list = self.occurrences.get_mut(pair as usize).map(std::mem::take).unwrap_or_default();
        if !list.is_sorted_by(|x, y| x < y) {
            list.sort_unstable();
            list.dedup();
        }
        list
    }

    /// Counts a pair's offsets, in no order and not all in one place.
    pub fn histogram(&mut self, pair: u32, key: u64) -> Vec<(Offset, u64)> {
        let (a, b) = tokens(key);
        let mut list = self.take_list(pair);
        let Self { canvas, offsets, partners, .. } = self;
        let mut kept = 0;
        for start in (0..list.len()).step_by(BLOCK) {
            let end = list.len().min(start + BLOCK);
            let end = start + canvas.fetch(&mut list[start..end], a);
            for i in start..end {
                let x = list[i];
                canvas.partners(x, b, partners);
                for &y in &*partners {
                    let offset = canvas.offset(x, y);
                    match offsets.iter_mut().take(16).find(|(other, _)| *other == offset) {
                        Some((_, count)) => *count += 1,
                        None => offsets.push((offset, 1)),
                    }
                }
                list[kept] = x;
                kept += usize::from(!partners.is_empty());
            }
        }
        list.truncate(kept);
        if let Some(place) = self.occurrences.get_mut(pair as usize) {
            *place = list;
        }
        std::mem::take(&mut self.offsets)
    }

    /// Applies a rule to the shard's grids, notes what it did to the counts, and returns how many regions it merged.
    pub fn apply(&mut self, merge: Merge<'_>, interrupt: &Interrupt) -> u64 {
        let Merge { pair, a, b, offset, token, slots } = merge;
        let mut list = self.take_list(pair);
        let Self {
            canvas,
            occurrences,
            removed,
            adjacencies,
            num_adjacencies,
            added,
            scratch,
            of_x,
            of_y,
            ..
        } = self;
        let mut end = 0;
        added.clear();
        removed.clear();
        removed.resize(slots.len as usize, 0);
        let side_of_b = if a == b { 0 } else { 2 };
        let mut left = Vec::new();
        let mut merges = 0;
        for block in list.chunks_mut(BLOCK) {
            if interrupt.is_set() {
                return merges;
            }
            let valid = canvas.fetch(block, a);
            for &x in &block[..valid] {
                // One before it may have taken it.
                if !canvas.is(x, a) {
                    continue;
                }
                canvas.neighbours(x, of_x);
                let (mut y, mut any) = (NONE, false);
                of_x.for_each(|z, other| {
                    if other == b && z > x {
                        any = true;
                        if offset.is_none_or(|offset| canvas.offset(x, z) == offset) {
                            y = y.min(z);
                        }
                    }
                });
                if y == NONE {
                    if any {
                        left.push(x);
                    }
                    continue;
                }
                canvas.neighbours(y, of_y);
                canvas.merge(x, y, token);
                merges += 1;
                let room = end + of_x.len() + of_y.len();
                if adjacencies.len() < room {
                    adjacencies.resize(2 * room, (0, 0));
                }
                // Always written and kept by moving on.
                let mut add = |z: u32, other: u32, wanted: bool| {
                    let side = usize::from(z < x) * usize::from(other != token);
                    scratch[other as usize][side] += u32::from(wanted);
                    adjacencies[end] = (2 * other + side as u32, x.min(z));
                    end += usize::from(wanted);
                };
                of_x.for_each(|z, other| {
                    removed[slots.of(other)[usize::from(z < x)] as usize] += 1;
                    add(z, other, z != y);
                });
                of_y.for_each(|z, other| {
                    removed[slots.of(other)[side_of_b + usize::from(z < y)] as usize] += u32::from(z != x);
                    add(z, other, z != x && !of_x.contains(z));
                });
            }
        }
        *num_adjacencies = end;
        if let Some(list) = occurrences.get_mut(pair as usize) {
            *list = left;
        }
        // Pairs that came with one merge and went with a later one.
        let [a_new, new_a, b_new, new_b] = slots.of(token).map(|slot| removed[slot as usize]);
        scratch[a as usize][1] -= a_new;
        scratch[a as usize][0] -= new_a;
        scratch[b as usize][1] -= b_new;
        scratch[b as usize][0] -= new_b;
        for &(pair, _) in &adjacencies[..end] {
            let count = std::mem::take(&mut scratch[pair as usize / 2][pair as usize % 2]);
            if count > 0 {
                added.push((pair, count));
            }
        }
        merges
    }

    /// Per slot, how many adjacent pairs the last rule took away.
    pub fn removed(&self) -> &[u32] {
        &self.removed
    }

    /// Pairs that came with the last rule, each once, and their counts.
    pub fn added(&self) -> &[(NewPair, u32)] {
        &self.added
    }

    /// Starts the lists of those new pairs that were taken up after [`Shard::apply`], given their indices.
    pub fn index_added(&mut self, pairs: &[(NewPair, u32)]) {
        let Self { adjacencies, num_adjacencies, added, scratch, occurrences, .. } = self;
        let Some(&(_, last)) = pairs.last() else { return };
        if occurrences.len() <= last as usize {
            occurrences.resize_with(last as usize + 1, Vec::new);
        }
        for &(new, pair) in pairs {
            scratch[new as usize / 2][new as usize % 2] = pair + 1;
        }
        for &mut (new, count) in added {
            if let Some(pair) = scratch[new as usize / 2][new as usize % 2].checked_sub(1) {
                occurrences[pair as usize].reserve_exact(count as usize);
            }
        }
        for &(new, x) in &adjacencies[..*num_adjacencies] {
            if let Some(pair) = scratch[new as usize / 2][new as usize % 2].checked_sub(1) {
                let found = &mut occurrences[pair as usize];
                if found.last() != Some(&x) {
                    found.push(x);
                }
            }
        }
        for &(new, _) in pairs {
            scratch[new as usize / 2][new as usize % 2] = 0;
        }
    }
}

/// All cells, in pieces whose pairs are a good number to look at together.
fn ranges<W: Word>(canvas: &Canvas<W>) -> impl Iterator<Item = Range<usize>> + use<W> {
    let len = canvas.len();
    (0..len).step_by(PIECE).map(move |start| start..len.min(start + PIECE))
}

/// The high bits say where a pair is counted.
fn hash(key: u64) -> u64 {
    key.wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

fn part(hash: u64) -> usize {
    (hash >> (u64::BITS - PARTS.ilog2())) as usize
}
