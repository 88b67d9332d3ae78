//! Where indexed pairs occur.
//!
//! There are tens of thousands of lists, most of them short, which come and go. With a piece of memory for each, a
//! tenth of the time would go to getting memory and giving it back, and more with threads that do so at once. So lists
//! lie one after the other in a few blocks.

use crate::error::Result;
use crate::memory;

/// What memory is for, in messages.
const LISTS: &str = "the lists of where pairs occur";

/// Two anchors as one number; numbers are in raster order of the first, then of the second.
#[inline]
pub(super) fn pack(x: u32, y: u32) -> u64 {
    u64::from(x) << 32 | u64::from(y)
}

/// The anchors in such a number.
#[inline]
pub(super) fn unpack(anchors: u64) -> (u32, u32) {
    ((anchors >> 32) as u32, anchors as u32)
}

/// Occurrences of pairs.
#[derive(Debug)]
pub(super) enum Occurrences<Cells = Vec<u32>, Regions = Vec<u64>> {
    /// Of single cells: the first of the two. The other lies right of it, below it, or both.
    Cells(Cells),
    /// Of any regions: the anchors of both, packed.
    Regions(Regions),
}

impl Occurrences {
    /// Number of occurrences.
    pub fn len(&self) -> usize {
        match self {
            Self::Cells(positions) => positions.len(),
            Self::Regions(anchors) => anchors.len(),
        }
    }
}

/// Occurrences of some pairs, one pair after the other.
#[derive(Debug)]
pub(super) struct PairOccurrences {
    /// Keys and numbers of occurrences.
    pub pairs: Vec<(u64, usize)>,
    pub occurrences: Occurrences,
}

/// Lists of occurrences, by the index of their pair.
#[derive(Debug)]
pub(super) struct OccurrenceLists {
    spans: Vec<Span>,
    cell_blocks: Vec<Block<u32>>,
    region_block: Block<u64>,
    /// With fewer items, what is left of dropped lists does not take enough memory to be worth moving the other lists.
    min_compaction: usize,
}

/// Where a list lies in a block.
#[derive(Debug, Clone, Copy)]
struct Span {
    start: usize,
    len: u32,
    /// The number of its block of cells, or `REGION_BLOCK`.
    block: u32,
}

const REGION_BLOCK: u32 = u32::MAX;

const NO_SPAN: Span = Span { start: 0, len: 0, block: REGION_BLOCK };

/// A batch of at least this number of cells gets a block of its own, since copying it would take long.
const MIN_OWN_BLOCK: usize = 1 << 12;

/// Lists, and what is left of dropped ones.
#[derive(Debug, Default)]
struct Block<T> {
    items: Vec<T>,
    /// How many items are in lists.
    num_listed: usize,
}

impl OccurrenceLists {
    /// No lists, with memory for those of regions. Blocks of cells with fewer items than `min_compaction` stay as they
    /// are.
    pub fn new(mut memory: Vec<u64>, min_compaction: usize) -> Self {
        memory.clear();
        Self {
            spans: Vec::new(),
            cell_blocks: Vec::new(),
            region_block: Block { items: memory, num_listed: 0 },
            min_compaction,
        }
    }

    /// Adds the occurrences of those pairs that have an index, which is their key's place among `keys`.
    pub fn extend(
        &mut self,
        keys: &[u64],
        PairOccurrences { pairs, occurrences }: PairOccurrences,
    ) -> Result<()> {
        memory::lengthen(&mut self.spans, keys.len(), NO_SPAN, LISTS)?;
        // Put all occurrences at the end of a block: a large batch of cells in one of its own.
        let (block, mut start) = match occurrences {
            Occurrences::Cells(positions) => {
                if self.cell_blocks.is_empty() || positions.len() >= MIN_OWN_BLOCK {
                    self.cell_blocks.push(Block::default());
                }
                let block = self.cell_blocks.len() - 1;
                (block as u32, self.cell_blocks[block].append(positions)?)
            }
            Occurrences::Regions(anchors) => (REGION_BLOCK, self.region_block.append(anchors)?),
        };
        for (key, len) in pairs {
            // Pairs with an index get a list; the items of others are in no list.
            if let Ok(pair) = keys.binary_search(&key) {
                self.spans[pair] = Span { start, len: len as u32, block };
                match self.cell_blocks.get_mut(block as usize) {
                    Some(cells) => cells.num_listed += len,
                    None => self.region_block.num_listed += len,
                }
            }
            start += len;
        }
        Ok(())
    }

    /// Adds lists of regions of these lengths for pair `first` and those after it, to be filled: one after the other.
    pub fn add(&mut self, first: u32, lens: &[usize], fill: impl FnOnce(&mut [u64])) -> Result<()> {
        self.region_block.make_room(lens.iter().sum(), &mut self.spans)?;
        // Pairs before the first one may have no list.
        memory::resize(&mut self.spans, first as usize, NO_SPAN, LISTS)?;
        memory::reserve(&mut self.spans, lens.len(), LISTS)?;
        let begin = self.region_block.items.len();
        let mut start = begin;
        for &len in lens {
            self.spans.push(Span { start, len: len as u32, block: REGION_BLOCK });
            start += len;
        }
        self.region_block.num_listed += start - begin;
        self.region_block.items.resize(start, 0);
        fill(&mut self.region_block.items[begin..]);
        Ok(())
    }

    /// The list of a pair.
    pub fn get(&mut self, pair: u32) -> Occurrences<&mut [u32], &mut [u64]> {
        let Span { start, len, block } = self.spans.get(pair as usize).copied().unwrap_or(NO_SPAN);
        let range = start..start + len as usize;
        match self.cell_blocks.get_mut(block as usize) {
            Some(cells) => Occurrences::Cells(&mut cells.items[range]),
            None => Occurrences::Regions(&mut self.region_block.items[range]),
        }
    }

    /// Drops all but the first `len` occurrences of a pair.
    pub fn truncate(&mut self, pair: u32, len: usize) {
        let Some(span) = self.spans.get_mut(pair as usize) else { return };
        let num_dropped = (span.len as usize).saturating_sub(len);
        span.len -= num_dropped as u32;
        match self.cell_blocks.get_mut(span.block as usize) {
            Some(cells) => cells.num_listed -= num_dropped,
            None => self.region_block.num_listed -= num_dropped,
        }
    }

    /// Whether it is time to [`compact`](OccurrenceLists::compact): the block of regions is all but full, or half of a
    /// block of cells is in no list.
    pub fn should_compact(&self) -> bool {
        self.region_block.is_nearly_full(64) && self.region_block.is_wasteful(&self.spans)
            || self.cell_blocks.iter().any(|cells| cells.is_emptier_than(2.0, self.min_compaction))
    }

    /// Leaves out items that are in no list, in blocks with many of them.
    pub fn compact(&mut self) -> Result<()> {
        if self.region_block.is_nearly_full(8) && self.region_block.is_wasteful(&self.spans) {
            self.region_block.compact(&mut self.spans, REGION_BLOCK)?;
        }
        for (number, cells) in (0..).zip(&mut self.cell_blocks) {
            if cells.is_emptier_than(1.75, self.min_compaction) {
                cells.compact(&mut self.spans, number)?;
                cells.items.shrink_to_fit();
            }
        }
        Ok(())
    }
}

impl<T: Copy> Block<T> {
    /// Adds items and returns where they begin.
    fn append(&mut self, items: Vec<T>) -> Result<usize> {
        let start = self.items.len();
        if start == 0 {
            self.items = items;
        } else {
            memory::extend_from_slice(&mut self.items, &items, LISTS)?;
        }
        Ok(start)
    }

    /// Makes room for `number` more items in the block of regions: leaves out those that are in no list, if they are
    /// many, or else takes more memory.
    fn make_room(&mut self, number: usize, spans: &mut [Span]) -> Result<()> {
        if self.items.len() + number > self.items.capacity() {
            if self.is_wasteful(spans) {
                self.compact(spans, REGION_BLOCK)?;
            }
            if self.items.len() + number > self.items.capacity() {
                let growth = self.growth(spans);
                memory::reserve_exact(&mut self.items, number + growth, LISTS)?;
            }
        }
        Ok(())
    }

    /// How many items the block of regions grows by, and may hold that are in no list.
    fn growth(&self, spans: &[Span]) -> usize {
        self.items.len() / 4 + spans.len()
    }

    /// Whether the room left is less than one in `share` of the items.
    fn is_nearly_full(&self, share: usize) -> bool {
        self.items.len() + self.items.len() / share > self.items.capacity()
    }

    /// Whether many items are in no list.
    fn is_wasteful(&self, spans: &[Span]) -> bool {
        self.items.len() - self.num_listed > self.growth(spans)
    }

    /// Whether the block has more than `min_items` items, and more than `times` times those that are in lists.
    fn is_emptier_than(&self, times: f64, min_items: usize) -> bool {
        self.items.len() > min_items && self.items.len() as f64 > times * self.num_listed as f64
    }

    /// Leaves out items that are in no list, this being the block of that number.
    fn compact(&mut self, spans: &mut [Span], number: u32) -> Result<()> {
        let mut spans =
            memory::collect(spans.iter_mut().filter(|span| span.block == number), "moving lists")?;
        // Move the lists to the front in the order in which they lie, so that none is overwritten.
        spans.sort_unstable_by_key(|span| span.start);
        let mut end = 0;
        for span in spans {
            self.items.copy_within(span.start..span.start + span.len as usize, end);
            span.start = end;
            end += span.len as usize;
        }
        self.items.truncate(end);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// However many come and go, and whether small blocks are compacted or not, every list holds what was put
        /// there.
        #[test]
        fn lists_hold_what_plain_ones_do(
            lens_at_start in prop::collection::vec(prop_oneof![0..300_usize, MIN_OWN_BLOCK..MIN_OWN_BLOCK + 300], 0..20),
            steps in prop::collection::vec((prop::collection::vec(0..200_usize, 1..4), any::<u32>(), 0..100_usize), 0..200),
            memory in 0..1000_usize,
            min_compaction in prop::sample::select(vec![1 << 8, 1 << 21]),
        ) {
            let mut lists = OccurrenceLists::new(vec![7; memory], min_compaction);
            let mut plain_lists: Vec<Vec<u64>> = Vec::new();
            // Every second key has no index.
            let keys: Vec<u64> = (0..lens_at_start.len() as u64).map(|number| 2 * number).collect();
            for (key, &len) in keys.iter().zip(&lens_at_start) {
                let positions: Vec<u32> = (0..2 * len as u32 + 5).collect();
                plain_lists.push(positions[5..5 + len].iter().map(|&position| position.into()).collect());
                lists.extend(&keys, PairOccurrences {
                    pairs: vec![(key + 1, 5), (*key, len), (key + 1, len)],
                    occurrences: Occurrences::Cells(positions),
                }).unwrap();
            }
            for (step, (lens, pair, len)) in steps.iter().enumerate() {
                lists.add(plain_lists.len() as u32, lens, |items| {
                    assert_eq!(items.len(), lens.iter().sum::<usize>());
                    items.iter_mut().zip(step as u64 * 1000..).for_each(|(item, value)| *item = value);
                }).unwrap();
                let mut values = step as u64 * 1000..;
                plain_lists.extend(lens.iter().map(|&len| values.by_ref().take(len).collect::<Vec<_>>()));
                let pair = *pair as usize % (plain_lists.len() + 1);
                lists.truncate(pair as u32, *len);
                if let Some(list) = plain_lists.get_mut(pair) {
                    list.truncate(*len);
                }
                if step % 5 == 0 {
                    lists.compact().unwrap();
                }
            }
            for (pair, plain_list) in plain_lists.iter().enumerate() {
                let list: Vec<u64> = match lists.get(pair as u32) {
                    Occurrences::Cells(positions) => positions.iter().map(|&position| position.into()).collect(),
                    Occurrences::Regions(anchors) => anchors.to_vec(),
                };
                prop_assert_eq!(&list, plain_list);
            }
        }
    }
}
