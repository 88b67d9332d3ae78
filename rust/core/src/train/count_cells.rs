//! Counting pairs while every cell is a region of its own.
//!
//! With the cells sorted by token, the pairs that begin with one token are counted in one small table, exactly, and
//! those that are frequent enough are listed at once:
//! 1. The tokens are parted into groups, and the cells of one group after the other are sorted by token.
//! 2. From a sample of the first group's tokens the threshold is estimated that leaves about the target number of
//!    pairs.
//! 3. For each token, the pairs that begin with it are counted, and those at or above the threshold are listed.

use std::cmp::Reverse;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::occurrences::{Occurrences, PairOccurrences};
use super::pair::Count;
use super::regions::RegionMap;
use super::word::Word;
use crate::error::Result;
use crate::interrupt::Interrupt;
use crate::memory;
use crate::statistics::key;
use crate::threads::Threads;

/// About how many cells are sorted at a time, unless there are many more.
const MAX_SORTED_CELLS: usize = 1 << 25;

/// Most groups of tokens. All cells are read for each group; with fewer groups, learning from a million grids takes
/// more memory.
const MAX_GROUPS: usize = 4;

/// Tokens are of one of this number of classes, each a fair sample of them.
const NUM_CLASSES: u32 = 8;

/// With fewer tokens than this, one class does not tell how frequent pairs are.
const MIN_SAMPLED_TOKENS: u32 = 1 << 12;

/// With fewer cells than this, waking threads is not worth it.
const MIN_PARALLEL_CELLS: usize = 1 << 14;

/// With fewer cells than this, a count of pairs fits 32 bits, so that a [`Count`] fits one `u64`.
const MAX_U64_CELLS: usize = 1 << 31;

/// Most positions for which memory is kept from token to token.
const MAX_KEPT_POSITIONS: usize = 1 << 20;

/// What memory is for, in messages.
const COUNTS: &str = "the counts of pairs";

fn class_of(token: u32) -> u32 {
    token.wrapping_mul(0x9E37_79B1) >> (u32::BITS - NUM_CLASSES.ilog2())
}

/// The group of a token; a group is one class or several.
fn group_of(token: u32, num_groups: u32) -> u32 {
    class_of(token) * num_groups / NUM_CLASSES
}

/// The frequent pairs of cells.
#[derive(Debug, Default)]
pub(super) struct FrequentPairs {
    /// All pairs with at least this count are here.
    pub threshold: u64,
    pub counts: Vec<(u64, Count)>,
    /// Per region map, where the pairs occur.
    pub occurrences: Vec<Vec<PairOccurrences>>,
    /// Per region map, memory to use again: new memory takes long where a virtual machine must first be given it.
    pub memory: Vec<Vec<u64>>,
}

/// The frequent pairs that one thread has counted.
#[derive(Default)]
struct ThreadOutput {
    counts: Vec<(u64, Count)>,
    /// Per region map.
    lists: Vec<PairLists>,
}

/// Where pairs occur, one pair after the other.
#[derive(Default)]
struct PairLists {
    /// Keys, and numbers of positions.
    pairs: Vec<(u64, usize)>,
    positions: Vec<u32>,
}

/// A search for the frequent pairs in region maps in which every cell is a region of its own.
pub(super) struct CellPairSearch<'a, W> {
    pub region_maps: &'a [&'a RegionMap<W>],
    /// About how many pairs are to be at or above the threshold.
    pub target: usize,
    /// Bounds of the threshold; if no threshold within them leaves `target` pairs, the lower one is taken.
    pub bounds: RangeInclusive<u64>,
    pub threads: &'a Threads,
    pub interrupt: &'a Interrupt,
}

impl<W: Word> CellPairSearch<'_, W> {
    /// Finds the pairs at or above a threshold that about the target number of pairs reach.
    pub fn run(&self) -> Result<FrequentPairs> {
        let border = self.region_maps.iter().map(|regions| regions.border).max().unwrap_or_default();
        match (border <= u16::MAX.into(), self.num_cells() < MAX_U64_CELLS) {
            (true, true) => self.run_packed::<OneWord, u64>(),
            (true, false) => self.run_packed::<OneWord, Count>(),
            (false, true) => self.run_packed::<TwoWords, u64>(),
            (false, false) => self.run_packed::<TwoWords, Count>(),
        }
    }

    fn run_packed<P: Packing, C: CellCount>(&self) -> Result<FrequentPairs> {
        let mut result = FrequentPairs { threshold: *self.bounds.start(), ..FrequentPairs::default() };
        let Some(&&RegionMap { base_vocab_size, border, .. }) = self.region_maps.first() else {
            return Ok(result);
        };
        let num_cells = self.num_cells();
        let num_groups = num_cells.div_ceil(MAX_SORTED_CELLS).next_power_of_two().min(MAX_GROUPS) as u32;

        let new_counter = |_| PairCounter::<C>::new(border);
        let mut counters: Vec<_> = (0..self.threads.count()).map(new_counter).collect::<Result<_>>()?;
        let mut sources: Vec<_> =
            self.region_maps.iter().map(|&regions| (regions, CellsByToken::default())).collect();
        result.occurrences.resize_with(sources.len(), Vec::new);
        for group in 0..num_groups {
            // 1. Sort the cells of the group.
            self.threads.map(&mut sources, num_cells >= MIN_PARALLEL_CELLS, |(regions, cells)| {
                cells.sort::<W, P>(regions, group, num_groups)
            })?;
            let cells: Vec<_> = sources.iter().map(|(_, cells)| cells).collect();
            // The most frequent tokens first, so that at the end no thread waits long for another.
            let count = |token: u32| cells.iter().map(|cells| cells.len(token)).sum::<usize>();
            let of_group = (0..base_vocab_size).filter(|&token| group_of(token, num_groups) == group);
            let mut tokens = memory::collect(of_group.map(|token| (Reverse(count(token)), token)), COUNTS)?;
            tokens.sort_unstable();
            let tokens: Vec<u32> = memory::collect(tokens.into_iter().map(|(_, token)| token), COUNTS)?;
            // 2. Estimate the threshold.
            if group == 0 {
                let num_sampled_classes =
                    if base_vocab_size < MIN_SAMPLED_TOKENS { NUM_CLASSES / num_groups } else { 1 };
                result.threshold =
                    self.estimate_threshold::<P, C>(&mut counters, &tokens, &cells, num_sampled_classes)?;
            }
            // 3. Count the pairs, and list the frequent ones.
            for output in self.list_frequent::<P, C>(&mut counters, &tokens, &cells, result.threshold)? {
                memory::extend(&mut result.counts, output.counts, COUNTS)?;
                for (occurrences, PairLists { pairs, positions }) in
                    result.occurrences.iter_mut().zip(output.lists)
                {
                    occurrences.push(PairOccurrences { pairs, occurrences: Occurrences::Cells(positions) });
                }
            }
        }
        result.memory = sources.into_iter().map(|(_, cells)| cells.words).collect();
        Ok(result)
    }

    /// The threshold within the bounds that about the target number of pairs reach, as far as the tokens of the first
    /// classes tell.
    fn estimate_threshold<P: Packing, C: CellCount>(
        &self,
        counters: &mut [PairCounter<C>],
        tokens: &[u32],
        cells: &[&CellsByToken],
        num_sampled_classes: u32,
    ) -> Result<u64> {
        let sample = tokens.iter().copied().filter(|&token| class_of(token) < num_sampled_classes);
        let sample: Vec<u32> = memory::collect(sample, COUNTS)?;
        // Most pairs are rarer than the lower bound, and do not count for a threshold above it.
        let min_count = self.bounds.start();
        let counts = self.count_each::<P, C, _>(counters, &sample, cells, |counter, _, counts| {
            let totals = counter.counts().map(|(_, count)| count.total);
            memory::extend(counts, totals.filter(|total| min_count <= total), COUNTS)
        })?;
        let mut counts: Vec<u64> = memory::collect(counts.into_iter().flatten(), COUNTS)?;
        let target = self.target * num_sampled_classes as usize / NUM_CLASSES as usize;
        if counts.len() <= target {
            return Ok(*min_count);
        }
        let (_, &mut count, _) = counts.select_nth_unstable_by_key(target, |&count| Reverse(count));
        Ok((count + 1).min(*self.bounds.end()).max(*min_count))
    }

    /// Counts all pairs that begin with one of `tokens`, and lists those at or above the threshold.
    fn list_frequent<P: Packing, C: CellCount>(
        &self,
        counters: &mut [PairCounter<C>],
        tokens: &[u32],
        cells: &[&CellsByToken],
        threshold: u64,
    ) -> Result<Vec<ThreadOutput>> {
        self.count_each::<P, C, _>(counters, tokens, cells, |counter, a, output: &mut ThreadOutput| {
            if output.lists.is_empty() {
                // Much room at once, if there is: pages of memory that are not written cost nothing.
                let room = |cells: &CellsByToken| cells.words.len() / P::WORDS / self.threads.count();
                let list = |cells: &&CellsByToken| {
                    let positions = memory::with_capacity(room(cells), COUNTS).unwrap_or_default();
                    PairLists { pairs: Vec::new(), positions }
                };
                output.lists = cells.iter().map(list).collect();
            }
            counter.list::<P>(a, cells, threshold, output)
        })
    }

    fn num_cells(&self) -> usize {
        self.region_maps.iter().map(|regions| regions.len()).sum()
    }

    /// Counts the pairs that begin with each of `tokens`, on all threads; `collect` adds them to the output of a
    /// thread.
    fn count_each<P: Packing, C: CellCount, R: Default + Send>(
        &self,
        counters: &mut [PairCounter<C>],
        tokens: &[u32],
        cells: &[&CellsByToken],
        collect: impl Fn(&mut PairCounter<C>, u32, &mut R) -> Result<()> + Sync + Send,
    ) -> Result<Vec<R>> {
        let next = AtomicUsize::new(0);
        self.threads.map(counters, self.num_cells() >= MIN_PARALLEL_CELLS, |counter| {
            let mut output = R::default();
            while let Some(&a) = tokens.get(next.fetch_add(1, Ordering::Relaxed))
                && !self.interrupt.is_set()
            {
                counter.count::<P>(a, cells);
                collect(counter, a, &mut output)?;
                counter.clear();
            }
            Ok(output)
        })
    }
}

/// A cell: its position, and the tokens of the cells right of it and below it.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Cell {
    x: u32,
    right: u32,
    below: u32,
}

/// How a cell is packed into words of memory.
trait Packing {
    /// Number of words.
    const WORDS: usize;
    fn pack(cell: Cell, words: &mut [u64]);
    fn unpack(words: &[u64]) -> Cell;
}

/// Packs into one word, for tokens of 16 bits.
struct OneWord;

impl Packing for OneWord {
    const WORDS: usize = 1;
    #[inline]
    fn pack(Cell { x, right, below }: Cell, words: &mut [u64]) {
        words[0] = u64::from(x) | u64::from(right) << 32 | u64::from(below) << 48;
    }
    #[inline]
    fn unpack(words: &[u64]) -> Cell {
        let word = words[0];
        Cell { x: word as u32, right: (word >> 32) as u32 & 0xFFFF, below: (word >> 48) as u32 }
    }
}

/// Packs into two words, for any tokens.
struct TwoWords;

impl Packing for TwoWords {
    const WORDS: usize = 2;
    #[inline]
    fn pack(Cell { x, right, below }: Cell, words: &mut [u64]) {
        (words[0], words[1]) = (u64::from(x) | u64::from(right) << 32, below.into());
    }
    #[inline]
    fn unpack(words: &[u64]) -> Cell {
        Cell { x: words[0] as u32, right: (words[0] >> 32) as u32, below: words[1] as u32 }
    }
}

/// The packed cells of a group of tokens, token by token, in raster order.
#[derive(Debug, Default)]
struct CellsByToken {
    /// Per token, the number of its cells.
    counts: Vec<u32>,
    words: Vec<u64>,
    /// Per token, where its cells begin and end.
    ranges: Vec<(u32, u32)>,
}

impl CellsByToken {
    /// Sorts the cells of one group of tokens.
    fn sort<W: Word, P: Packing>(
        &mut self,
        regions: &RegionMap<W>,
        group: u32,
        num_groups: u32,
    ) -> Result<()> {
        const SORTED_CELLS: &str = "the cells in order of their tokens";
        let Self { counts, words, ranges } = self;
        // The first time, take memory for the largest group.
        if counts.is_empty() {
            *counts = memory::zeros(regions.border as usize + 1, SORTED_CELLS)?;
            regions.for_each_cell(|_, token, _, _| counts[token as usize] += 1);
            let mut sizes = vec![0; num_groups as usize];
            for (token, &count) in (0..regions.base_vocab_size).zip(&*counts) {
                sizes[group_of(token, num_groups) as usize] += count as usize;
            }
            let max_size = sizes.into_iter().max().unwrap_or_default();
            *words = memory::zeros((1 + max_size) * P::WORDS, SORTED_CELLS)?;
        }
        // Counting sort, branchless: cells of other groups have cursor 0, and are all written to place 0.
        let mut end = 1;
        let mut cursors = memory::zeros::<u32>(counts.len(), SORTED_CELLS)?;
        *ranges = memory::try_vec(counts.len(), (0, 0), SORTED_CELLS)?;
        for (token, &count) in (0..regions.base_vocab_size).zip(&*counts) {
            if group_of(token, num_groups) == group {
                cursors[token as usize] = end;
                ranges[token as usize] = (end, end + count);
                end += count;
            }
        }
        regions.for_each_cell(|x, token, right, below| {
            let cursor = &mut cursors[token as usize];
            // Put the cell at the cursor of its token.
            P::pack(Cell { x, right, below }, &mut words[*cursor as usize * P::WORDS..]);
            *cursor += u32::from(*cursor > 0);
        });
        Ok(())
    }

    /// Number of cells of a token.
    fn len(&self, token: u32) -> usize {
        let (start, end) = self.ranges[token as usize];
        (end - start) as usize
    }

    /// The cells of a token.
    #[inline]
    fn cells<P: Packing>(&self, token: u32) -> impl Iterator<Item = Cell> {
        let (start, end) = self.ranges[token as usize];
        self.words[start as usize * P::WORDS..end as usize * P::WORDS].chunks_exact(P::WORDS).map(P::unpack)
    }
}

/// A [`Count`], perhaps in less memory.
trait CellCount: Copy + Default + Send {
    /// No pairs, this many times.
    fn zeros(len: usize) -> Result<Vec<Self>>;
    /// Counts one more pair, whose second cell is `below` the first or right of it.
    fn add(&mut self, below: bool);
    fn count(self) -> Count;
}

impl CellCount for Count {
    fn zeros(len: usize) -> Result<Vec<Self>> {
        memory::try_vec(len, Self::default(), COUNTS)
    }
    fn add(&mut self, below: bool) {
        self.total += 1;
        self.below += u64::from(below);
    }
    fn count(self) -> Count {
        self
    }
}

/// For fewer than [`MAX_U64_CELLS`] cells: `total` in the low half, `below` in the high half.
impl CellCount for u64 {
    fn zeros(len: usize) -> Result<Vec<Self>> {
        memory::zeros(len, COUNTS)
    }
    #[inline]
    fn add(&mut self, below: bool) {
        *self += 1 | u64::from(below) << 32;
    }
    #[inline]
    fn count(self) -> Count {
        Count { total: self & u64::from(u32::MAX), below: self >> 32 }
    }
}

/// Counts the pairs that begin with one token.
struct PairCounter<C> {
    /// By the second token.
    counts: Vec<C>,
    /// By the second token, where the pair's next occurrence goes in `positions`; 0 for pairs that are not listed.
    cursors: Vec<usize>,
    /// The occurrences of listed pairs, pair by pair.
    positions: Vec<u32>,
    /// The first `len` are the second tokens, each once.
    second_tokens: Vec<u32>,
    len: usize,
    border: u32,
}

impl<C: CellCount> PairCounter<C> {
    fn new(border: u32) -> Result<Self> {
        let tokens = border as usize + 1;
        Ok(Self {
            counts: C::zeros(tokens)?,
            cursors: memory::zeros(tokens, COUNTS)?,
            positions: Vec::new(),
            // One more, which is written but does not count.
            second_tokens: memory::zeros(tokens + 1, COUNTS)?,
            len: 0,
            border,
        })
    }

    /// Counts all pairs (a, any token). Branchless.
    fn count<P: Packing>(&mut self, a: u32, sources: &[&CellsByToken]) {
        let Self { counts, second_tokens, len, .. } = self;
        let mut add = |token: u32, below: bool| {
            let count = &mut counts[token as usize];
            // A token is added when it is met first.
            second_tokens[*len] = token;
            *len += usize::from(count.count().total == 0);
            count.add(below);
        };
        for Cell { right, below, .. } in sources.iter().flat_map(|cells| cells.cells::<P>(a)) {
            add(right, false);
            add(below, true);
        }
    }

    /// The second tokens, without the border, and the counts.
    fn counts(&self) -> impl Iterator<Item = (u32, Count)> {
        let tokens = self.second_tokens[..self.len].iter().filter(|&&token| token != self.border);
        tokens.map(|&token| (token, self.counts[token as usize].count()))
    }

    /// Lists where the pairs at or above the threshold occur.
    fn list<P: Packing>(
        &mut self,
        a: u32,
        sources: &[&CellsByToken],
        threshold: u64,
        output: &mut ThreadOutput,
    ) -> Result<()> {
        let frequent_pairs = self.counts().filter(|&(_, count)| count.total >= threshold);
        let frequent_pairs: Vec<_> = memory::collect(frequent_pairs, COUNTS)?;
        if frequent_pairs.is_empty() {
            return Ok(());
        }
        // Each frequent pair gets a part of `positions`, by its count.
        let mut end = 1;
        let mut starts = memory::with_capacity(frequent_pairs.len(), COUNTS)?;
        for &(b, count) in &frequent_pairs {
            self.cursors[b as usize] = end;
            starts.push(end);
            end += count.total as usize;
        }
        memory::lengthen(&mut self.positions, end, 0, COUNTS)?;
        let Self { cursors, positions, border, .. } = self;
        for (cells, PairLists { pairs, positions: pair_positions }) in sources.iter().zip(&mut output.lists) {
            // Branchless: other pairs have cursor 0, and are all written to place 0.
            let mut list = |token: u32, x: u32| {
                let cursor = &mut cursors[token as usize];
                positions[*cursor] = x;
                *cursor += usize::from(*cursor > 0);
            };
            for Cell { x, right, below } in cells.cells::<P>(a) {
                list(right, x);
                // A cell is listed once, even if both its neighbours have the token.
                list(if below == right { *border } else { below }, x);
            }
            // The lists of this source go to the output, and the cursors back to where they began.
            for (&(b, _), &start) in frequent_pairs.iter().zip(&starts) {
                let cursor = &mut cursors[b as usize];
                let list = &positions[start..*cursor];
                memory::push(pairs, (key(a, b), list.len()), COUNTS)?;
                memory::extend_from_slice(pair_positions, list, COUNTS)?;
                *cursor = start;
            }
        }
        // Give back the memory of a very frequent token, and clear the cursors.
        if positions.len() > MAX_KEPT_POSITIONS {
            *positions = Vec::new();
        }
        for &(b, count) in &frequent_pairs {
            cursors[b as usize] = 0;
            memory::push(&mut output.counts, (key(a, b), count), COUNTS)?;
        }
        Ok(())
    }

    /// Forgets the counts.
    fn clear(&mut self) {
        for &token in &self.second_tokens[..self.len] {
            self.counts[token as usize] = C::default();
        }
        self.len = 0;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::word::Word32;
    use super::*;

    proptest! {
        /// However cells and counts are packed, the counts and lists are the same.
        #[test]
        fn packings_make_no_difference(
            ids in prop::collection::vec(0..7_u32, 12..300),
            border in 7..60_000_u32,
            target in 1..30_usize,
        ) {
            let mut regions = RegionMap::<Word32<18>>::new(7, border);
            let start = regions.add_grid(ids.len() as u32 / 6, 6).unwrap();
            for (row, ids) in ids.chunks_exact(6).enumerate() {
                regions.set_row(start + 7 * row as u32, ids);
            }
            let (threads, interrupt) = (Threads::new(1).unwrap(), Interrupt::default());
            let maps = [&regions];
            let search = CellPairSearch {
                region_maps: &maps, target, bounds: 1..=100, threads: &threads, interrupt: &interrupt
            };
            let text = |FrequentPairs { threshold, counts, occurrences, .. }: FrequentPairs| {
                format!("{threshold} {counts:?} {occurrences:?}")
            };
            let expected = text(search.run().unwrap());
            prop_assert_eq!(&text(search.run_packed::<OneWord, Count>().unwrap()), &expected);
            prop_assert_eq!(&text(search.run_packed::<TwoWords, u64>().unwrap()), &expected);
            prop_assert_eq!(&text(search.run_packed::<TwoWords, Count>().unwrap()), &expected);
        }

        #[test]
        fn cells_are_the_same_after_packing(x: u32, right: u32, below: u32) {
            let mut words = [0; 2];
            let cell = Cell { x, right, below };
            TwoWords::pack(cell, &mut words);
            prop_assert_eq!(TwoWords::unpack(&words), cell);
            let cell = Cell { x, right: right & 0xFFFF, below: below & 0xFFFF };
            OneWord::pack(cell, &mut words);
            prop_assert_eq!(OneWord::unpack(&words), cell);
        }
    }
}
