//! A shard: some of the grids, with lists of where the indexed pairs occur in them.

use rustc_hash::FxHashMap;

use crate::grid::{Grid, Offset};
use crate::interrupt::Interrupt;
use crate::region::Canvas;
use crate::statistics::{key, tokens};

/// Most cells of a shard before its last grid is added. With that grid there are fewer than 2^31 cells, so positions
/// and all counts within a shard fit 32 bits.
const MAX_CELLS: u64 = 1 << 30;

/// Work between two looks at the interrupt flag.
const CHECK_INTERVAL: usize = 1 << 14;

/// Occurrences that are merged in one go; more, if they are in the same grid.
const CHUNK: usize = 1024;

/// Token of a region that is about to become part of the region before it.
const CONSUMED: u32 = u32::MAX - 1;

/// No slot, no pair.
const NONE: u32 = u32::MAX;

/// Anchors of two adjacent regions, in raster order. It stands for the tokens that the regions had when it was
/// written down, and is out of date when they have others: a region's token never comes back.
type Occurrence = [u32; 2];

/// One rule to apply.
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

/// What a rule did to the counts in a shard.
pub(super) struct Changes {
    /// Per slot, how many adjacent pairs are gone.
    pub removed: Vec<u32>,
    /// Pairs with the new token and their counts.
    pub added: Vec<(u64, u64)>,
}

/// Numbers the indexed pairs that contain `a` or `b` of a rule, so that they are found without hashing.
#[derive(Debug, Default)]
pub(super) struct Slots {
    /// Per token t, the slot of (a, t), (t, a), (b, t), (t, b).
    tables: [Vec<u32>; 4],
    /// Number of slots.
    len: usize,
    assigned: Vec<(usize, u32)>,
}

impl Slots {
    /// Gives slots 0, 1, … to these pairs, for tokens below `token`.
    pub fn assign(&mut self, a: u32, b: u32, token: u32, keys: impl Iterator<Item = u64>) {
        for (table, token) in self.assigned.drain(..) {
            self.tables[table][token as usize] = NONE;
        }
        for table in &mut self.tables {
            table.resize(token as usize, NONE);
        }
        self.len = 0;
        for (slot, key) in (0..).zip(keys) {
            self.len += 1;
            let (first, second) = tokens(key);
            for (table, applies, other) in [
                (0, first == a, second),
                (1, second == a, first),
                (2, first == b, second),
                (3, second == b, first),
            ] {
                if applies {
                    self.tables[table][other as usize] = slot;
                    self.assigned.push((table, other));
                }
            }
        }
    }
}

/// Exact counts of some pairs, which are numbered as they turn up.
#[derive(Debug, Default)]
struct Counted {
    numbers: FxHashMap<u64, u32>,
    counts: Vec<u32>,
    occurrences: Vec<(u32, Occurrence)>,
}

/// Some of the grids.
#[derive(Debug, Default)]
pub(super) struct Shard {
    members: Vec<usize>,
    num_cells: u64,
    canvas: Canvas,
    /// Per indexed pair, where it occurs, and some places where it no longer does.
    occurrences: Vec<Vec<Occurrence>>,
    counted: Counted,
    /// Adjacencies of the new token after a rule: the other token, whether it comes second, the anchors.
    added: Vec<(u32, bool, Occurrence)>,
    /// Two numbers per token, for the pairs (new, t) and (t, new); all 0 between calls.
    scratch: [Vec<u32>; 2],
}

/// Deals grids out to about `parts` shards of equal numbers of cells. Grids of one width go together.
pub(super) fn deal(grids: &[Grid], parts: usize) -> Vec<Shard> {
    let cells = |grid: &Grid| Canvas::footprint(grid.height(), grid.width());
    let total: u64 = grids.iter().map(cells).sum();
    let target = total.div_ceil(parts as u64).clamp(1, MAX_CELLS);
    let mut order: Vec<usize> = (0..grids.len()).collect();
    order.sort_by_key(|&index| grids[index].width());
    let mut shards: Vec<Shard> = Vec::new();
    for index in order {
        if shards.last().is_none_or(|shard| shard.num_cells >= target) {
            shards.push(Shard::default());
        }
        if let Some(shard) = shards.last_mut() {
            shard.members.push(index);
            shard.num_cells += cells(&grids[index]);
        }
    }
    shards
}

impl Shard {
    /// Copies the shard's grids.
    pub fn fill(&mut self, grids: &[Grid], interrupt: &Interrupt) {
        self.canvas = Canvas::with_capacity(self.num_cells as usize);
        for index in std::mem::take(&mut self.members) {
            if interrupt.is_set() {
                return;
            }
            self.canvas.push(&grids[index]);
        }
    }

    /// Counts all pairs by a hash of 2^`bits` values: upper bounds of their counts.
    pub fn sketch(&self, bits: u32, interrupt: &Interrupt) -> Vec<u32> {
        let mut sketch = vec![0_u32; 1 << bits];
        self.for_each_pair(interrupt, |key, _| sketch[hash(key, bits)] += 1);
        sketch
    }

    /// Counts exactly those pairs whose bound reaches the threshold, and notes where they occur.
    pub fn count(
        &mut self,
        sketch: &[u32],
        bits: u32,
        threshold: u64,
        interrupt: &Interrupt,
    ) -> Vec<(u64, u64)> {
        let mut counted = Counted::default();
        self.for_each_pair(interrupt, |key, occurrence| {
            if u64::from(sketch[hash(key, bits)]) >= threshold {
                let fresh = counted.counts.len() as u32;
                let number = *counted.numbers.entry(key).or_insert(fresh);
                if number == fresh {
                    counted.counts.push(0);
                }
                counted.counts[number as usize] += 1;
                counted.occurrences.push((number, occurrence));
            }
        });
        self.counted = counted;
        let Counted { numbers, counts, .. } = &self.counted;
        numbers.iter().map(|(&key, &number)| (key, counts[number as usize].into())).collect()
    }

    /// Makes what was counted the new lists, given the indices of the pairs that were taken up.
    pub fn index_counted(&mut self, pairs: &FxHashMap<u64, u32>) {
        self.occurrences.clear();
        self.occurrences.resize_with(pairs.len(), Vec::new);
        let Counted { numbers, counts, occurrences } = std::mem::take(&mut self.counted);
        let mut pair_of = vec![NONE; counts.len()];
        for (key, number) in numbers {
            if let Some(&pair) = pairs.get(&key) {
                pair_of[number as usize] = pair;
                self.occurrences[pair as usize].reserve_exact(counts[number as usize] as usize);
            }
        }
        for (number, occurrence) in occurrences {
            let pair = pair_of[number as usize];
            if pair != NONE {
                self.occurrences[pair as usize].push(occurrence);
            }
        }
    }

    fn for_each_pair(&self, interrupt: &Interrupt, mut visit: impl FnMut(u64, Occurrence)) {
        let canvas = &self.canvas;
        let mut found = Vec::new();
        for (i, x) in canvas.anchors().enumerate() {
            if i % CHECK_INTERVAL == 0 && interrupt.is_set() {
                return;
            }
            found.clear();
            canvas.later_neighbours(x, &mut found);
            for &y in &found {
                visit(key(canvas.token(x), canvas.token(y)), [x, y]);
            }
        }
    }

    /// Gives up a pair's list.
    pub fn forget(&mut self, pair: u32) {
        if let Some(list) = self.occurrences.get_mut(pair as usize) {
            *list = Vec::new();
        }
    }

    /// Counts a pair's offsets, in no order.
    pub fn histogram(&mut self, pair: u32, key: u64) -> Vec<(Offset, u64)> {
        let (a, b) = tokens(key);
        let Self { canvas, occurrences, .. } = self;
        let Some(list) = occurrences.get_mut(pair as usize) else { return Vec::new() };
        let mut counts: FxHashMap<Offset, u64> = FxHashMap::default();
        list.retain(|&[x, y]| {
            let stands = canvas.token_at(x) == Some(a) && canvas.token_at(y) == Some(b);
            if stands {
                *counts.entry(canvas.offset(x, y)).or_default() += 1;
            }
            stands
        });
        counts.into_iter().collect()
    }

    /// Applies a rule to the shard's grids.
    pub fn apply(&mut self, merge: &Merge<'_>, interrupt: &Interrupt) -> Changes {
        for numbers in &mut self.scratch {
            numbers.resize(merge.token as usize + 1, 0);
        }
        self.added.clear();
        let mut changes = Changes { removed: vec![0; merge.slots.len], added: Vec::new() };
        let matches = self.take_matches(merge);
        let mut rest = matches.as_slice();
        let mut neighbours = Neighbours::default();
        while let Some(&[last, _]) = rest[..rest.len().min(CHUNK)].last() {
            // Whole grids at a time, because what a region's neighbours were must be known before any of them merges.
            let end = self.canvas.grid_end(last);
            let (chunk, later) = rest.split_at(rest.partition_point(|&[x, _]| x < end));
            rest = later;
            neighbours.clear();
            for (i, &pair) in chunk.iter().enumerate() {
                if i % CHECK_INTERVAL == 0 && interrupt.is_set() {
                    return changes;
                }
                self.remove_pair(merge, pair, &mut neighbours, &mut changes.removed);
            }
            for &[x, y] in chunk {
                self.canvas.merge(x, y, merge.token, |_| ());
            }
            for (&[x, _], found) in chunk.iter().zip(neighbours.iter_mut()) {
                self.add_pairs(merge, x, found);
            }
        }
        self.drain_scratch(merge, &mut changes.added);
        changes
    }

    /// The occurrences that merge, in raster order; marks their regions, and keeps the list of what is left.
    fn take_matches(&mut self, merge: &Merge<'_>) -> Vec<Occurrence> {
        let &Merge { a, b, offset, token, .. } = merge;
        let Self { canvas, occurrences, .. } = self;
        let Some(list) = occurrences.get_mut(merge.pair as usize) else { return Vec::new() };
        let mut matches = std::mem::take(list);
        matches.retain(|&[x, y]| {
            let stands = canvas.token_at(x) == Some(a) && canvas.token_at(y) == Some(b);
            let matches = stands && offset.is_none_or(|offset| canvas.offset(x, y) == offset);
            if stands && !matches {
                list.push([x, y]);
            }
            matches
        });
        if !matches.is_sorted() {
            matches.sort_unstable();
        }
        matches.retain(|&[x, y]| {
            let free = canvas.token(x) == a && canvas.token(y) == b;
            if free {
                canvas.set_token(x, token);
                canvas.set_token(y, CONSUMED);
            }
            free
        });
        matches
    }

    /// Notes the neighbours of two regions about to merge and takes their pairs from the counts.
    fn remove_pair(
        &self,
        merge: &Merge<'_>,
        [x, y]: Occurrence,
        neighbours: &mut Neighbours,
        removed: &mut [u32],
    ) {
        let canvas = &self.canvas;
        for (region, tables) in [(x, 0), (y, if merge.a == merge.b { 0 } else { 2 })] {
            let first = neighbours.anchors.len();
            canvas.neighbours(region, &mut neighbours.anchors);
            for &other in &neighbours.anchors[first..] {
                // The pair of two regions that both merge is taken away when the first of them is at hand.
                let was = match canvas.token(other) {
                    token if token == merge.token || token == CONSUMED => {
                        if other < region {
                            continue;
                        }
                        if token == CONSUMED { merge.b } else { merge.a }
                    }
                    token => token,
                };
                let table = &merge.slots.tables[tables + usize::from(other < region)];
                let slot = table[was as usize];
                if slot != NONE {
                    removed[slot as usize] += 1;
                }
            }
        }
        neighbours.ends.push(neighbours.anchors.len());
    }

    /// Counts and notes the pairs of a merged region, given who the neighbours of its parts were.
    fn add_pairs(&mut self, merge: &Merge<'_>, x: u32, neighbours: &mut [u32]) {
        let canvas = &self.canvas;
        for other in &mut *neighbours {
            *other = canvas.anchor(*other);
        }
        neighbours.sort_unstable();
        let mut last = x;
        for &other in &*neighbours {
            if other == last || other == x {
                continue;
            }
            last = other;
            let token = canvas.token(other);
            let second = other > x;
            // A pair of two new regions is counted by the first of them.
            if token == merge.token && !second {
                continue;
            }
            self.scratch[usize::from(!second)][token as usize] += 1;
            self.added.push((token, second, if second { [x, other] } else { [other, x] }));
        }
    }

    /// Turns the counts of pairs with the new token into a list, and clears them.
    fn drain_scratch(&mut self, merge: &Merge<'_>, counts: &mut Vec<(u64, u64)>) {
        for &(token, second, _) in &self.added {
            let count = std::mem::take(&mut self.scratch[usize::from(!second)][token as usize]);
            if count > 0 {
                let key = if second { key(merge.token, token) } else { key(token, merge.token) };
                counts.push((key, count.into()));
            }
        }
    }

    /// Starts the lists of those new pairs that were taken up after [`Shard::apply`], given their indices.
    pub fn index_added(&mut self, new: u32, pairs: &[(u64, u32)]) {
        let Self { added, scratch, occurrences, .. } = self;
        let place = |key: u64| match tokens(key) {
            (first, second) if first == new => (0, second as usize),
            (first, _) => (1, first as usize),
        };
        for &(key, pair) in pairs {
            let (side, token) = place(key);
            scratch[side][token] = pair + 1;
        }
        let len = pairs.iter().map(|&(_, pair)| pair as usize + 1).max().unwrap_or(0);
        if occurrences.len() < len {
            occurrences.resize_with(len, Vec::new);
        }
        for (token, second, occurrence) in added.drain(..) {
            if let Some(pair) = scratch[usize::from(!second)][token as usize].checked_sub(1) {
                occurrences[pair as usize].push(occurrence);
            }
        }
        for &(key, _) in pairs {
            let (side, token) = place(key);
            scratch[side][token] = 0;
        }
    }
}

/// Neighbours of the two parts of each new region.
#[derive(Default)]
struct Neighbours {
    anchors: Vec<u32>,
    ends: Vec<usize>,
}

impl Neighbours {
    fn clear(&mut self) {
        self.anchors.clear();
        self.ends.clear();
    }

    fn iter_mut(&mut self) -> impl Iterator<Item = &mut [u32]> {
        let mut rest = self.anchors.as_mut_slice();
        let mut start = 0;
        self.ends.iter().map(move |&end| {
            let (found, later) = std::mem::take(&mut rest).split_at_mut(end - start);
            (rest, start) = (later, end);
            found
        })
    }
}

/// Where a pair is counted among 2^`bits` numbers.
fn hash(key: u64, bits: u32) -> usize {
    (key.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (64 - bits)) as usize
}
