//! A shard: some of the grids, with lists of where the indexed pairs occur in them.

use std::sync::Arc;

use super::count_regions::{CountedPair, Sketch, count_frequent};
use super::merge::{
    BLOCK, MAX_OCCURRENCES_PER_SUM, MergeStep, PairDeltas, RemovedPair, join_cells, join_regions,
};
use super::neighbours::Neighbours;
use super::occurrences::{OccurrenceLists, Occurrences, PairOccurrences, pack, unpack};
use super::pair::{Count, NewPair, Pair};
use super::regions::RegionMap;
use super::word::Word;
use crate::encode::Encoding;
use crate::error::Result;
use crate::grid::Offset;
use crate::interrupt::Interrupt;
use crate::memory;

/// Most distances between anchors that are counted in a table.
const MAX_TABLE_DISTANCES: u64 = 1 << 16;

/// What memory is for, in messages.
const COUNTS: &str = "the counts of pairs";

/// Blocks of lists with fewer occurrences are not compacted.
const MIN_COMPACTION: usize = 1 << 21;

/// What a merge changes about the lists, once the counts of all shards are added up.
#[derive(Debug)]
pub(super) struct ListUpdate {
    /// The pairs with the new token that were indexed, and their indices, which follow each other.
    pub new_lists: Vec<(NewPair, u32)>,
    /// Indices of pairs that are no longer indexed.
    pub dropped_lists: Vec<u32>,
    /// Whether to compact the lists. All shards do so at once if one has to, so that the others need not wait for each.
    pub compact: bool,
}

/// Some of the grids.
#[derive(Debug)]
pub(super) struct Shard<W> {
    regions: RegionMap<W>,
    /// Number of regions when the grids were set.
    num_regions: u64,
    /// Per indexed pair, where it occurs, and some places where it no longer does. Those are known by an anchor that
    /// has another token, since a region's token never comes back.
    lists: OccurrenceLists,
    sketch: Sketch,
    /// The pairs counted last: how often they occur, by key, and where.
    counts: Vec<(u64, Count)>,
    occurrences: Vec<PairOccurrences>,
    /// What the last merge changes.
    deltas: PairDeltas,
    /// How many pairs of regions it joined.
    num_merges: u64,
    /// How many pairs it took away, as asked for.
    removals: Vec<Count>,
    /// The pairs with the new token that may be frequent.
    frequent_pairs: Vec<NewPair>,
    /// Whether it is time to compact the lists.
    should_compact: bool,
    /// The last merge, and what it changes about the lists, if that is still to be done.
    list_update: Option<(MergeStep, Arc<ListUpdate>)>,
    /// How often the pairs counted last, which are numbered, occur at which offset.
    offset_counts: Vec<((usize, Offset), u64)>,
    /// How often a pair occurs at which distance between positions; all 0 between calls.
    distance_counts: Vec<u32>,
    neighbours: Neighbours,
}

impl<W: Word> Shard<W> {
    /// No grids, for tokens below `tokens`, those of the codebook being below `base_vocab_size`.
    pub fn new(base_vocab_size: u32, tokens: u32) -> Result<Self> {
        Ok(Self {
            regions: RegionMap::new(base_vocab_size, tokens),
            num_regions: 0,
            lists: OccurrenceLists::new(Vec::new(), MIN_COMPACTION),
            sketch: Sketch::default(),
            counts: Vec::new(),
            occurrences: Vec::new(),
            // One more, for the border.
            deltas: PairDeltas::new(tokens as usize + 1)?,
            num_merges: 0,
            removals: Vec::new(),
            frequent_pairs: Vec::new(),
            should_compact: false,
            list_update: None,
            offset_counts: Vec::new(),
            distance_counts: Vec::new(),
            neighbours: Neighbours::default(),
        })
    }

    /// Makes room for exactly this many positions.
    pub fn reserve(&mut self, positions: u64) -> Result<()> {
        self.regions.reserve(positions as usize)
    }

    /// Adds an empty grid and returns where it is.
    pub fn add_grid(&mut self, height: u32, width: u32) -> Result<u32> {
        self.regions.add_grid(height, width)
    }

    /// Fills a grid of this width, every cell a region of its own.
    pub fn set_grid(&mut self, position: u32, width: u32, ids: &[u32]) {
        self.num_regions += ids.len() as u64;
        for (start, row) in (position..).step_by(width as usize + 1).zip(ids.chunks_exact(width as usize)) {
            self.regions.set_row(start, row);
        }
    }

    /// Fills a grid of this width with the regions that it was encoded to.
    pub fn set_encoded_grid(&mut self, position: u32, width: u32, encoding: &Encoding) -> Result<()> {
        let Some(regions) = &encoding.regions else { return Ok(()) };
        self.num_regions += encoding.ids.len() as u64;
        let mut anchors = memory::try_vec(encoding.ids.len(), None, "the anchors of regions")?;
        let rows = (position..).step_by(width as usize + 1).zip(regions.tokens.chunks_exact(width as usize));
        // The first cell of a token in raster order is its anchor.
        for (p, &index) in rows.flat_map(|(start, row)| (start..).zip(row)) {
            let token = encoding.ids[index as usize];
            match anchors[index as usize] {
                None => {
                    self.regions.set_row(p, &[token]);
                    anchors[index as usize] = Some(p);
                }
                Some(anchor) => self.regions.join(anchor, p, token),
            }
        }
        Ok(())
    }

    /// Number of regions when the grids were set.
    pub fn num_regions(&self) -> u64 {
        self.num_regions
    }

    /// Its grids.
    pub fn regions(&self) -> &RegionMap<W> {
        &self.regions
    }

    /// Takes the occurrences of pairs that were counted elsewhere, and memory for lists to come.
    pub fn set_occurrences(&mut self, occurrences: Vec<PairOccurrences>, memory: Vec<u64>) {
        self.occurrences = occurrences;
        self.lists = OccurrenceLists::new(memory, MIN_COMPACTION);
    }

    /// Counts all pairs by a hash of 2^`bits` values: upper bounds of their counts.
    pub fn count_by_hash(&mut self, bits: u32, interrupt: &Interrupt) -> Result<()> {
        self.sketch = Sketch::new(&self.regions, bits, interrupt)?;
        Ok(())
    }

    /// The result of [`Shard::count_by_hash`].
    pub fn sketch(&self) -> &Sketch {
        &self.sketch
    }

    /// Counts exactly those pairs whose hash has a bit in `frequent_hashes`, and lists where they occur. No region has
    /// more than `max_cells` cells.
    pub fn count_frequent(
        &mut self,
        frequent_hashes: &[u64],
        max_cells: u64,
        interrupt: &Interrupt,
    ) -> Result<()> {
        self.update_lists()?;
        self.lists = OccurrenceLists::new(Vec::new(), MIN_COMPACTION);
        let sketch = std::mem::take(&mut self.sketch);
        let max_cells = max_cells.min(self.regions.len() as u64) as usize;
        let pairs = count_frequent(&mut self.regions, &sketch, frequent_hashes, max_cells, interrupt)?;
        self.counts = memory::collect(pairs.iter().map(|pair| (pair.key, pair.count)), COUNTS)?;
        let occurrences = |CountedPair { key, occurrences, .. }| PairOccurrences {
            pairs: vec![(key, occurrences.len())],
            occurrences,
        };
        self.occurrences = memory::collect(pairs.into_iter().map(occurrences), COUNTS)?;
        Ok(())
    }

    /// The counts of [`Shard::count_frequent`], taken out.
    pub fn take_counts(&mut self) -> Vec<(u64, Count)> {
        std::mem::take(&mut self.counts)
    }

    /// Makes lists of the occurrences counted last. `keys` are those of the indexed pairs, in order of their indices.
    pub fn build_lists(&mut self, keys: &[u64]) -> Result<()> {
        std::mem::take(&mut self.occurrences)
            .into_iter()
            .try_for_each(|occurrences| self.lists.extend(keys, occurrences))
    }

    /// Counts the offsets of numbered pairs of regions, in no order and with several counts for some, and leaves out of
    /// the lists where the pairs no longer occur.
    pub fn count_offsets(&mut self, pairs: &[(usize, Pair)], interrupt: &Interrupt) -> Result<()> {
        self.update_lists()?;
        let Self { regions, lists, offset_counts, distance_counts, .. } = self;
        offset_counts.clear();
        let nexts = pairs.iter().skip(1).map(Some).chain([None]);
        for (&(number, pair), next) in pairs.iter().zip(nexts) {
            if interrupt.is_set() {
                return Ok(());
            }
            // While this pair is counted, the anchors of the next one are loaded.
            if let Some((_, next)) = next
                && let Occurrences::Regions(list) = lists.get(next.index)
            {
                regions.prefetch_anchors(list);
            }
            let Occurrences::Regions(list) = lists.get(pair.index) else { continue };
            // Grids of one width after the other: drop old occurrences, count the others, close the gap.
            let (mut start, mut end) = (0, 0);
            while let Some((stride, len)) = regions.leading_stride(&list[start..], |&at| unpack(at).0) {
                let part = &mut list[start..start + len];
                let num_kept = regions.retain_pairs(part, pair.a, pair.b);
                count_region_offsets(
                    regions,
                    (number, pair),
                    stride,
                    &part[..num_kept],
                    distance_counts,
                    offset_counts,
                )?;
                list.copy_within(start..start + num_kept, end);
                end += num_kept;
                start += len;
            }
            lists.truncate(pair.index, end);
        }
        Ok(())
    }

    /// The result of [`Shard::count_offsets`].
    pub fn offset_counts(&self) -> &[((usize, Offset), u64)] {
        &self.offset_counts
    }

    /// Applies a merge to the shard's grids, and records what it changes about the counts: the number of merges, the
    /// removals of `removed_pairs`, and the new pairs, of which those with `min_count` may be frequent.
    pub fn apply(
        &mut self,
        step: MergeStep,
        removed_pairs: &[RemovedPair],
        min_count: u64,
        interrupt: &Interrupt,
    ) -> Result<()> {
        self.prefetch_first_occurrences(step.pair.index);
        self.update_lists()?;
        self.deltas.start();
        self.removals.clear();
        memory::resize(&mut self.removals, removed_pairs.len(), Count::default(), COUNTS)?;
        self.num_merges = 0;
        self.join_occurrences(step, removed_pairs, interrupt)?;
        if interrupt.is_set() {
            return Ok(());
        }
        self.should_compact = self.lists.should_compact();
        let Self { deltas, frequent_pairs, .. } = self;
        let may_be_frequent = |&pair: &NewPair| u64::from(deltas.count(pair)) >= min_count;
        frequent_pairs.clear();
        memory::extend(frequent_pairs, deltas.new_pairs().iter().copied().filter(may_be_frequent), COUNTS)
    }

    /// Joins the occurrences of a pair, in raster order.
    fn join_occurrences(
        &mut self,
        step: MergeStep,
        removed_pairs: &[RemovedPair],
        interrupt: &Interrupt,
    ) -> Result<()> {
        let Self { regions, lists, deltas, neighbours, removals, num_merges, .. } = self;
        let Pair { index, a, b, .. } = step.pair;
        let base_vocab_size = regions.base_vocab_size;
        match lists.get(index) {
            Occurrences::Cells(list) => {
                let mut rest = &*list;
                while let Some((stride, len)) = regions.leading_stride(rest, |&x| x) {
                    let (same_stride, tail) = rest.split_at(len);
                    rest = tail;
                    for part in same_stride.chunks(MAX_OCCURRENCES_PER_SUM) {
                        deltas.clear_removals(step);
                        for (block, next) in blocks_with_next(part) {
                            if interrupt.is_set() {
                                return Ok(());
                            }
                            regions.prefetch_around_cells(next, stride);
                            *num_merges += join_cells(regions, step, stride, block, deltas)?;
                        }
                        deltas.sum_removals(step.pair, base_vocab_size, removed_pairs, removals);
                    }
                }
            }
            Occurrences::Regions(list) => {
                // The merge that made the list went over its new regions in raster order, so the list is nearly sorted.
                sort_nearly_sorted(list);
                let with_cell = a.min(b) < base_vocab_size;
                let join = if with_cell { join_regions::<true, W> } else { join_regions::<false, W> };
                let mut rest = &*list;
                while let Some((stride, len)) = regions.leading_stride(rest, |&at| unpack(at).0) {
                    let (same_stride, tail) = rest.split_at(len);
                    rest = tail;
                    for part in same_stride.chunks(MAX_OCCURRENCES_PER_SUM) {
                        deltas.clear_removals(step);
                        for (block, next) in blocks_with_next(part) {
                            if interrupt.is_set() {
                                return Ok(());
                            }
                            regions.prefetch_around(next, stride);
                            *num_merges += join(regions, step, stride, block, neighbours, deltas)?;
                        }
                        deltas.sum_removals(step.pair, base_vocab_size, removed_pairs, removals);
                    }
                }
            }
        }
        Ok(())
    }

    /// Begins to load the cache lines that a pair's first merges need.
    fn prefetch_first_occurrences(&mut self, pair: u32) {
        let Self { regions, lists, .. } = self;
        match lists.get(pair) {
            Occurrences::Cells(list) => {
                for &x in list.iter().take(BLOCK) {
                    regions.prefetch_around_cells(&[x], regions.stride(x));
                }
            }
            Occurrences::Regions(list) => {
                for &anchors in list.iter().take(BLOCK) {
                    regions.prefetch_around(&[anchors], regions.stride(unpack(anchors).0));
                }
            }
        }
    }

    /// How many pairs of regions the last merge joined.
    pub fn num_merges(&self) -> u64 {
        self.num_merges
    }

    /// Whether it is time to compact the lists.
    pub fn should_compact(&self) -> bool {
        self.should_compact
    }

    /// How many pairs of the last merge's `removed_pairs[number]` it took away.
    pub fn removals(&self, number: usize) -> Count {
        self.removals[number]
    }

    /// The pairs that came with the last merge, each once, without those with fewer adjacencies than its `min_count`.
    pub fn frequent_pairs(&self) -> &[NewPair] {
        &self.frequent_pairs
    }

    /// How often a new pair came with the last merge; the merge may have taken some of these away again.
    pub fn num_added(&self, pair: NewPair) -> u64 {
        self.deltas.count(pair).into()
    }

    /// Ends a merge. The lists are updated when the shard is next worked on, or before by [`Shard::update_lists`], so
    /// that threads need not be waited for once more.
    pub fn schedule_update(&mut self, step: MergeStep, update: Arc<ListUpdate>) {
        self.list_update = Some((step, update));
    }

    /// Builds the lists of the last merge's new pairs and drops those of dropped pairs, if that is still to be done.
    pub fn update_lists(&mut self) -> Result<()> {
        let Some((step, update)) = self.list_update.take() else { return Ok(()) };
        let Self { deltas, lists, .. } = self;
        let ListUpdate { new_lists, dropped_lists, compact } = &*update;
        // Make room, then add the new lists.
        for &pair in dropped_lists {
            lists.truncate(pair, 0);
        }
        if *compact {
            lists.compact()?;
        }
        deltas.clear_removals(step);
        let new_pairs = memory::collect(new_lists.iter().map(|&(pair, _)| pair), COUNTS)?;
        deltas.take_adjacencies(&new_pairs, |lens, adjacencies| {
            // Numbers of pairs count from 1.
            let mut cursors = memory::with_capacity(lens.len() + 1, COUNTS)?;
            cursors.push(0);
            cursors.extend(lens.iter().scan(0, |end, len| Some(std::mem::replace(end, *end + len))));
            let first = new_lists.first().map_or(0, |&(_, index)| index);
            lists.add(first, lens, |items| {
                let cursors = cursors.as_mut_slice();
                for &(number, z, x) in adjacencies {
                    let cursor = &mut cursors[number as usize];
                    items[*cursor] = pack(x.min(z), x.max(z));
                    *cursor += 1;
                }
            })
        })
    }
}

/// The blocks of a list, each with the one after it.
fn blocks_with_next<T>(list: &[T]) -> impl Iterator<Item = (&[T], &[T])> {
    let nexts = list.chunks(BLOCK).skip(1).chain([&[][..]]);
    list.chunks(BLOCK).zip(nexts)
}

/// Sorts a list in which few items are far from their place: by insertion, unless that takes too many moves.
fn sort_nearly_sorted(list: &mut [u64]) {
    let mut moves = 0;
    for i in 1..list.len() {
        let item = list[i];
        let mut to = i;
        while to > 0 && list[to - 1] > item {
            list[to] = list[to - 1];
            to -= 1;
        }
        list[to] = item;
        moves += i - to;
        if moves > 8 * list.len() {
            list.sort_unstable();
            return;
        }
    }
}

/// Counts the offsets of pairs of regions in grids with this stride.
fn count_region_offsets<W: Word>(
    regions: &RegionMap<W>,
    (number, pair): (usize, Pair),
    stride: u32,
    list: &[u64],
    distance_counts: &mut Vec<u32>,
    offset_counts: &mut Vec<((usize, Offset), u64)>,
) -> Result<()> {
    // Large regions in narrow grids: count by offset. The first few offsets are summed here, others by the caller.
    let max_size = pair.max_size();
    let max_distance = max_size.saturating_mul(stride.into());
    if 2 * max_size > u64::from(stride) || max_distance > MAX_TABLE_DISTANCES {
        let start = offset_counts.len();
        for &anchors in list {
            let (x, y) = unpack(anchors);
            let offset = (number, regions.offset(x, y));
            match offset_counts[start..].iter_mut().take(16).find(|(other, _)| *other == offset) {
                Some((_, count)) => *count += 1,
                None => memory::push(offset_counts, (offset, 1), COUNTS)?,
            }
        }
        return Ok(());
    }
    // Otherwise the distance between two positions tells the offset, and distances are counted in a table.
    // Count all, then take out each count at the first occurrence that has one.
    memory::lengthen(distance_counts, max_distance as usize, 0, COUNTS)?;
    let distance = |anchors| {
        let (x, y) = unpack(anchors);
        (y - x) as usize
    };
    for &anchors in list {
        distance_counts[distance(anchors)] += 1;
    }
    for &anchors in list {
        let distance = distance(anchors) as u32;
        let count = std::mem::take(&mut distance_counts[distance as usize]);
        if count > 0 {
            let dy = (distance + stride / 2) / stride;
            let dx = distance as i32 - (dy * stride) as i32;
            memory::push(offset_counts, ((number, Offset { dy: dy as i32, dx }), count.into()), COUNTS)?;
        }
    }
    Ok(())
}
