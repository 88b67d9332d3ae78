//! Counting pairs while every cell is a region of its own: with the cells sorted by token, the pairs that begin with one
//! token are counted in one small table, exactly, and those that are frequent enough are listed at once.

use std::cmp::Reverse;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::count_regions::Count;
use super::occurrences::{Found, Places};
use super::regions::{Canvas, Word};
use crate::interrupt::Interrupt;
use crate::statistics::key;
use crate::threads::Threads;

/// About how many cells are sorted at a time, unless there are many more.
const MOST_SORTED: usize = 1 << 25;

/// Most parts in which they are sorted. All cells are read for each; with fewer parts, learning from a million grids takes
/// more memory.
const MOST_GROUPS: usize = 4;

/// Tokens are of one of so many classes, each a fair sample of them.
const CLASSES: u32 = 8;

/// With fewer tokens than this, one class does not tell how frequent pairs are.
const FEW_TOKENS: u32 = 1 << 12;

/// With fewer cells than this, waking threads is not worth it.
const PARALLEL_CELLS: usize = 1 << 14;

/// With fewer cells than this, counts of pairs fit 32 bits.
const FEW_CELLS: usize = 1 << 31;

/// Most places for which memory is kept from token to token.
const MOST_KEPT: usize = 1 << 20;

fn class(token: u32) -> u32 {
    token.wrapping_mul(0x9E37_79B1) >> (u32::BITS - CLASSES.ilog2())
}

/// Frequent pairs of cells.
#[derive(Debug, Default)]
pub(super) struct Frequent {
    /// No other pair is as frequent.
    pub threshold: u64,
    pub counts: Vec<(u64, Count)>,
    /// Per canvas, where they occur, and memory for lists to come: fresh memory takes long where a virtual machine must
    /// first be given it.
    pub places: Vec<(Vec<Found>, Vec<u64>)>,
}

/// What a thread finds of them.
#[derive(Default)]
struct Part {
    counts: Vec<(u64, Count)>,
    /// Per canvas.
    places: Vec<Listed>,
}

/// Keys of pairs and numbers of their places, and all these places.
type Listed = (Vec<(u64, usize)>, Vec<u32>);

/// A search for the frequent pairs of some canvases, in which every cell is a region of its own.
pub(super) struct Search<'a, W> {
    pub canvases: &'a [&'a Canvas<W>],
    /// About how many pairs the threshold is to leave.
    pub wanted: usize,
    /// Of the threshold; the lower one comes first.
    pub bounds: RangeInclusive<u64>,
    pub threads: &'a Threads,
    pub interrupt: &'a Interrupt,
}

impl<W: Word> Search<'_, W> {
    /// Finds the pairs at or above a threshold that about the wanted number of pairs reach.
    pub fn run(&self) -> Frequent {
        let border = self.canvases.iter().map(|canvas| canvas.border).max().unwrap_or_default();
        match (border <= u16::MAX.into(), self.cells() < FEW_CELLS) {
            (true, true) => self.run_with::<Narrow, u64>(),
            (true, false) => self.run_with::<Narrow, Count>(),
            (false, true) => self.run_with::<Wide, u64>(),
            (false, false) => self.run_with::<Wide, Count>(),
        }
    }

    fn run_with<P: Packing, C: Tally>(&self) -> Frequent {
        let mut all = Frequent { threshold: *self.bounds.start(), ..Frequent::default() };
        let Some(&&Canvas { base_vocab_size, border, .. }) = self.canvases.first() else { return all };
        let cells = self.cells();
        // All cells are read for every group of classes, and those of its tokens sorted.
        let groups = cells.div_ceil(MOST_SORTED).next_power_of_two().min(MOST_GROUPS) as u32;
        let sampled = if base_vocab_size < FEW_TOKENS { CLASSES / groups } else { 1 };

        let mut counters: Vec<_> = (0..self.threads.count()).map(|_| Counter::<C>::new(border)).collect();
        let mut sources: Vec<_> = self.canvases.iter().map(|&canvas| (canvas, Sorted::default())).collect();
        all.places.resize_with(sources.len(), Default::default);
        for group in 0..groups {
            self.threads.map(&mut sources, cells >= PARALLEL_CELLS, |(canvas, sorted)| {
                sorted.sort::<W, P>(canvas, group, groups);
            });
            let sources: Vec<_> = sources.iter().map(|(_, sorted)| sorted).collect();
            // The frequent ones first, so that no thread waits long for another.
            let mut tokens: Vec<u32> =
                (0..base_vocab_size).filter(|&token| class(token) * groups / CLASSES == group).collect();
            let count = |token: u32| sources.iter().map(|sorted| sorted.len(token)).sum::<usize>();
            tokens.sort_by_cached_key(|&token| Reverse(count(token)));
            if group == 0 {
                let sample: Vec<u32> =
                    tokens.iter().copied().filter(|&token| class(token) < sampled).collect();
                // Most pairs are rarer than the lower bound, and do not tell what is above it.
                let counts =
                    self.count_each::<P, C, _>(&mut counters, &sample, &sources, |counter, _, found| {
                        let counts = counter.found().map(|(_, count)| count.all);
                        Vec::extend(found, counts.filter(|count| self.bounds.start() <= count));
                    });
                let mut counts = counts.concat();
                let wanted = self.wanted * sampled as usize / CLASSES as usize;
                if counts.len() > wanted {
                    let (_, &mut reached, _) =
                        counts.select_nth_unstable_by_key(wanted, |&count| Reverse(count));
                    all.threshold = (reached + 1).min(*self.bounds.end()).max(*self.bounds.start());
                }
            }
            let threshold = all.threshold;
            let parts = self.count_each::<P, C, _>(
                &mut counters,
                &tokens,
                &sources,
                |counter, a, part: &mut Part| {
                    if part.places.is_empty() {
                        // Pages count when they are written.
                        let room = |sorted: &&Sorted| sorted.words.len() / P::WORDS / self.threads.count();
                        part.places = sources
                            .iter()
                            .map(|sorted| (Vec::new(), Vec::with_capacity(room(sorted))))
                            .collect();
                    }
                    counter.list::<P>(a, &sources, threshold, part);
                },
            );
            for Part { counts, places } in parts {
                all.counts.extend(counts);
                for ((found, _), (pairs, places)) in all.places.iter_mut().zip(places) {
                    found.push(Found { pairs, places: Places::Cells(places) });
                }
            }
        }
        for ((_, memory), (_, sorted)) in all.places.iter_mut().zip(sources) {
            *memory = sorted.words;
        }
        all
    }

    fn cells(&self) -> usize {
        self.canvases.iter().map(|canvas| canvas.len()).sum()
    }

    /// Counts the pairs that begin with each of `tokens`, on all threads; `take` makes of them what a thread returns.
    fn count_each<P: Packing, C: Tally, R: Default + Send>(
        &self,
        counters: &mut [Counter<C>],
        tokens: &[u32],
        sources: &[&Sorted],
        take: impl Fn(&mut Counter<C>, u32, &mut R) + Sync + Send,
    ) -> Vec<R> {
        let next = AtomicUsize::new(0);
        self.threads.map(counters, self.cells() >= PARALLEL_CELLS, |counter| {
            let mut taken = R::default();
            while let Some(&a) = tokens.get(next.fetch_add(1, Ordering::Relaxed))
                && !self.interrupt.is_set()
            {
                counter.count::<P>(a, sources);
                take(counter, a, &mut taken);
                counter.clear();
            }
            taken
        })
    }
}

/// A cell: its position and the tokens right of it and below it.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Cell {
    x: u32,
    right: u32,
    below: u32,
}

/// How a cell is packed.
trait Packing {
    /// Number of words.
    const WORDS: usize;
    fn pack(cell: Cell, words: &mut [u64]);
    fn unpack(words: &[u64]) -> Cell;
}

/// For tokens of 16 bits.
struct Narrow;

impl Packing for Narrow {
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

/// For any tokens.
struct Wide;

impl Packing for Wide {
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

/// The packed cells of some tokens, token by token, in raster order.
#[derive(Debug, Default)]
struct Sorted {
    /// How many cells each token has.
    counts: Vec<u32>,
    words: Vec<u64>,
    /// Per token, where its cells begin and end.
    ranges: Vec<(u32, u32)>,
}

impl Sorted {
    /// Sorts the cells of one group of tokens.
    fn sort<W: Word, P: Packing>(&mut self, canvas: &Canvas<W>, group: u32, groups: u32) {
        let group_of = |token: u32| class(token) * groups / CLASSES;
        let Self { counts, words, ranges } = self;
        if counts.is_empty() {
            *counts = vec![0; canvas.border as usize + 1];
            canvas.for_each_cell(|_, token, _, _| counts[token as usize] += 1);
            let mut sizes = vec![0; groups as usize];
            for (token, &count) in (0..canvas.base_vocab_size).zip(&*counts) {
                sizes[group_of(token) as usize] += count as usize;
            }
            *words = vec![0; (1 + sizes.into_iter().max().unwrap_or_default()) * P::WORDS];
        }
        // Other cells are written, too, since a branch would be guessed wrong half the time: all to place 0.
        let mut end = 1;
        let mut cursors = vec![0_u32; counts.len()];
        *ranges = vec![(0, 0); counts.len()];
        for (token, &count) in (0..canvas.base_vocab_size).zip(&*counts) {
            if group_of(token) == group {
                cursors[token as usize] = end;
                ranges[token as usize] = (end, end + count);
                end += count;
            }
        }
        canvas.for_each_cell(|x, token, right, below| {
            let cursor = &mut cursors[token as usize];
            P::pack(Cell { x, right, below }, &mut words[*cursor as usize * P::WORDS..]);
            *cursor += u32::from(*cursor > 0);
        });
    }

    /// How many cells of a token there are.
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
trait Tally: Copy + Default + Send {
    fn add(&mut self, below: bool);
    fn count(self) -> Count;
}

impl Tally for Count {
    fn add(&mut self, below: bool) {
        self.all += 1;
        self.below += u64::from(below);
    }
    fn count(self) -> Count {
        self
    }
}

/// For fewer than [`FEW_CELLS`]: all in the low half, below in the high half.
impl Tally for u64 {
    #[inline]
    fn add(&mut self, below: bool) {
        *self += 1 | u64::from(below) << 32;
    }
    #[inline]
    fn count(self) -> Count {
        Count { all: self & u64::from(u32::MAX), below: self >> 32 }
    }
}

/// Counts the pairs that begin with one token.
struct Counter<C> {
    /// By the second token.
    counts: Vec<C>,
    /// By the second token, where the pair's next place goes in `listed`; 0 for pairs that are not listed.
    cursors: Vec<usize>,
    /// The places of listed pairs, pair by pair.
    listed: Vec<u32>,
    /// The first `len` are the second tokens found.
    others: Vec<u32>,
    len: usize,
    border: u32,
}

impl<C: Tally> Counter<C> {
    fn new(border: u32) -> Self {
        let tokens = border as usize + 1;
        Self {
            counts: vec![C::default(); tokens],
            cursors: vec![0; tokens],
            listed: Vec::new(),
            others: vec![0; tokens + 1],
            len: 0,
            border,
        }
    }

    fn count<P: Packing>(&mut self, a: u32, sources: &[&Sorted]) {
        let Self { counts, others, len, .. } = self;
        let mut note = |token: u32, below: bool| {
            let count = &mut counts[token as usize];
            others[*len] = token;
            *len += usize::from(count.count().all == 0);
            count.add(below);
        };
        for Cell { right, below, .. } in sources.iter().flat_map(|sorted| sorted.cells::<P>(a)) {
            note(right, false);
            note(below, true);
        }
    }

    /// The pairs found, by their second token.
    fn found(&self) -> impl Iterator<Item = (u32, Count)> {
        let others = self.others[..self.len].iter().filter(|&&other| other != self.border);
        others.map(|&other| (other, self.counts[other as usize].count()))
    }

    /// Lists where pairs at or above the threshold occur.
    fn list<P: Packing>(&mut self, a: u32, sources: &[&Sorted], threshold: u64, part: &mut Part) {
        let listed: Vec<_> = self.found().filter(|&(_, count)| count.all >= threshold).collect();
        if listed.is_empty() {
            return;
        }
        // Place 0 takes what is not listed: a branch would be guessed wrong half the time.
        let mut end = 1;
        let mut starts = Vec::with_capacity(listed.len());
        for &(other, count) in &listed {
            self.cursors[other as usize] = end;
            starts.push(end);
            end += count.all as usize;
        }
        self.listed.resize(self.listed.len().max(end), 0);
        let Self { cursors, listed: places, border, .. } = self;
        for (sorted, (pairs, found)) in sources.iter().zip(&mut part.places) {
            let mut list = |token: u32, x: u32| {
                let cursor = &mut cursors[token as usize];
                places[*cursor] = x;
                *cursor += usize::from(*cursor > 0);
            };
            for Cell { x, right, below } in sorted.cells::<P>(a) {
                list(right, x);
                // Once is enough.
                list(if below == right { *border } else { below }, x);
            }
            for (&(other, _), &start) in listed.iter().zip(&starts) {
                let cursor = &mut cursors[other as usize];
                let list = &places[start..*cursor];
                pairs.push((key(a, other), list.len()));
                found.extend_from_slice(list);
                *cursor = start;
            }
        }
        if places.len() > MOST_KEPT {
            *places = Vec::new();
        }
        for &(other, count) in &listed {
            cursors[other as usize] = 0;
            part.counts.push((key(a, other), count));
        }
    }

    fn clear(&mut self) {
        for &other in &self.others[..self.len] {
            self.counts[other as usize] = C::default();
        }
        self.len = 0;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::regions::Short;
    use super::*;

    proptest! {
        /// However cells and counts are packed, the same is found.
        #[test]
        fn packings_make_no_difference(
            ids in prop::collection::vec(0..7_u32, 12..300),
            border in 7..60_000_u32,
            wanted in 1..30_usize,
        ) {
            let mut canvas = Canvas::<Short<18>>::new(7, border);
            let start = canvas.push(ids.len() as u32 / 6, 6);
            for (row, ids) in ids.chunks_exact(6).enumerate() {
                canvas.set_row(start + 7 * row as u32, ids);
            }
            let (threads, interrupt) = (Threads::new(1).unwrap(), Interrupt::default());
            let canvases = [&canvas];
            let search = Search {
                canvases: &canvases, wanted, bounds: 1..=100, threads: &threads, interrupt: &interrupt
            };
            let text = |Frequent { threshold, counts, places }: Frequent| {
                format!("{threshold} {counts:?} {:?}", places.into_iter().map(|(found, _)| found).collect::<Vec<_>>())
            };
            let found = text(search.run());
            prop_assert_eq!(&text(search.run_with::<Narrow, Count>()), &found);
            prop_assert_eq!(&text(search.run_with::<Wide, u64>()), &found);
            prop_assert_eq!(&text(search.run_with::<Wide, Count>()), &found);
        }

        #[test]
        fn cells_are_unpacked_as_they_were_packed(x: u32, right: u32, below: u32) {
            let mut words = [0; 2];
            let cell = Cell { x, right, below };
            Wide::pack(cell, &mut words);
            prop_assert_eq!(Wide::unpack(&words), cell);
            let cell = Cell { x, right: right & 0xFFFF, below: below & 0xFFFF };
            Narrow::pack(cell, &mut words);
            prop_assert_eq!(Narrow::unpack(&words), cell);
        }
    }
}
