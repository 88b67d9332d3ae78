//! Counting pairs while every cell is a region of its own: with the cells sorted by token, the pairs that begin with one
//! token are counted in one small table, exactly, and those that are frequent enough are listed at once.

use std::cmp::Reverse;
use std::ops::{Range, RangeInclusive};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::canvas::{Canvas, Word};
use super::count::{Count, Places};
use crate::interrupt::Interrupt;
use crate::statistics::key;
use crate::threads::Threads;

/// About how many cells are sorted at a time.
const MOST_SORTED: usize = 1 << 24;

/// Tokens are of one of so many classes, each a fair sample of them.
const CLASSES: u32 = 8;

/// With fewer tokens than this, one class does not tell how frequent pairs are.
const FEW_TOKENS: u32 = 1 << 12;

/// With fewer cells than this, waking threads is not worth it.
const PARALLEL_CELLS: usize = 1 << 14;

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
    /// By key.
    pub counts: Vec<(u64, Count)>,
    /// Per canvas, where they occur, by key.
    pub places: Vec<Vec<(u64, Places)>>,
}

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
        match self.canvases {
            [] => Frequent { threshold: *self.bounds.start(), ..Frequent::default() },
            [first, ..] if first.border <= u16::MAX.into() => self.run_with::<u16>(first),
            [first, ..] => self.run_with::<u32>(first),
        }
    }

    /// `T` is large enough for every token.
    fn run_with<T: Token>(&self, &Canvas { base_vocab_size, border, .. }: &Canvas<W>) -> Frequent {
        let cells = self.cells();
        // All cells are read for every group of classes, and those of its tokens sorted.
        let groups = cells.div_ceil(MOST_SORTED).next_power_of_two().min(CLASSES as usize) as u32;
        let sampled = if base_vocab_size < FEW_TOKENS { CLASSES / groups } else { 1 };

        let mut all = Frequent { threshold: *self.bounds.start(), ..Frequent::default() };
        all.places.resize_with(self.canvases.len(), Vec::new);
        let mut counters: Vec<_> = (0..self.threads.count()).map(|_| Counter::new(border)).collect();
        let mut sources: Vec<_> =
            self.canvases.iter().map(|&canvas| (canvas, Sorted::<T>::default())).collect();
        for group in 0..groups {
            let classes = CLASSES / groups * group..CLASSES / groups * (group + 1);
            self.threads.map(&mut sources, cells >= PARALLEL_CELLS, |(canvas, sorted)| {
                sorted.sort(canvas, &classes);
            });
            let sources: Vec<_> = sources.iter().map(|(_, sorted)| sorted).collect();
            // The frequent ones first, so that no thread waits long for another.
            let mut tokens: Vec<u32> =
                (0..base_vocab_size).filter(|&token| classes.contains(&class(token))).collect();
            let count = |token: u32| sources.iter().map(|sorted| sorted.of(token).len()).sum::<usize>();
            tokens.sort_by_cached_key(|&token| Reverse(count(token)));
            if group == 0 {
                let sample: Vec<u32> =
                    tokens.iter().copied().filter(|&token| class(token) < sampled).collect();
                let counts = self.count_each(&mut counters, &sample, &sources, |counter, _, found| {
                    Vec::extend(found, counter.found().map(|(_, count)| count.all));
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
            let parts =
                self.count_each(&mut counters, &tokens, &sources, |counter, a, part: &mut Frequent| {
                    part.places.resize_with(sources.len(), Vec::new);
                    counter.list(a, &sources, threshold, part);
                });
            for part in parts {
                all.counts.extend(part.counts);
                for (places, part) in all.places.iter_mut().zip(part.places) {
                    places.extend(part);
                }
            }
        }
        all
    }

    fn cells(&self) -> usize {
        self.canvases.iter().map(|canvas| canvas.len()).sum()
    }

    /// Counts the pairs that begin with each of `tokens`, on all threads; `take` makes of them what a thread returns.
    fn count_each<T: Token, R: Default + Send>(
        &self,
        counters: &mut [Counter],
        tokens: &[u32],
        sources: &[&Sorted<T>],
        take: impl Fn(&mut Counter, u32, &mut R) + Sync + Send,
    ) -> Vec<R> {
        let next = AtomicUsize::new(0);
        self.threads.map(counters, self.cells() >= PARALLEL_CELLS, |counter| {
            let mut taken = R::default();
            while let Some(&a) = tokens.get(next.fetch_add(1, Ordering::Relaxed))
                && !self.interrupt.is_set()
            {
                counter.count(a, sources);
                take(counter, a, &mut taken);
                counter.clear();
            }
            taken
        })
    }
}

/// A number that holds a token.
trait Token: Copy + Default + Send + Sync + TryFrom<u32> + Into<u32> {}
impl Token for u16 {}
impl Token for u32 {}

/// A cell: its position and the tokens right of it and below it.
#[derive(Debug, Default, Clone, Copy)]
struct Cell<T> {
    x: u32,
    right: T,
    below: T,
}

/// The cells of some tokens, token by token, in raster order.
#[derive(Debug, Default)]
struct Sorted<T> {
    cells: Vec<Cell<T>>,
    /// Per token, where its cells begin and end.
    ranges: Vec<(u32, u32)>,
}

impl<T: Token> Sorted<T> {
    /// Sorts the cells of the tokens of some classes.
    fn sort<W: Word>(&mut self, canvas: &Canvas<W>, classes: &Range<u32>) {
        let mut counts = vec![0_u32; canvas.border as usize + 1];
        canvas.for_each_cell(|_, token, _, _| counts[token as usize] += 1);
        // Other cells are written, too, since a branch would be guessed wrong half the time: all to place 0.
        let mut end = 1;
        let mut cursors = vec![(0_u32, 0_u32); counts.len()];
        for (token, count) in (0..canvas.base_vocab_size).zip(counts) {
            if classes.contains(&class(token)) {
                cursors[token as usize] = (end, 1);
                end += count;
            }
        }
        self.ranges = cursors.iter().map(|&(start, _)| (start, start)).collect();
        self.cells.resize(self.cells.len().max(end as usize), Cell::default());
        let cells = &mut self.cells[..];
        let narrow = |token: u32| T::try_from(token).unwrap_or_default();
        canvas.for_each_cell(|x, token, right, below| {
            let (cursor, step) = &mut cursors[token as usize];
            cells[*cursor as usize] = Cell { x, right: narrow(right), below: narrow(below) };
            *cursor += *step;
        });
        for ((_, end), (cursor, _)) in self.ranges.iter_mut().zip(cursors) {
            *end = cursor;
        }
    }

    fn of(&self, token: u32) -> &[Cell<T>] {
        let (start, end) = self.ranges[token as usize];
        &self.cells[start as usize..end as usize]
    }
}

/// Counts the pairs that begin with one token.
struct Counter {
    /// By the second token.
    counts: Vec<Count>,
    /// By the second token, where the pair's next place goes in `listed`, and how far that moves.
    cursors: Vec<(usize, usize)>,
    /// The places of listed pairs, pair by pair.
    listed: Vec<u32>,
    /// The first `len` are the second tokens found.
    others: Vec<u32>,
    len: usize,
    border: u32,
}

impl Counter {
    fn new(border: u32) -> Self {
        let tokens = border as usize + 1;
        let counts = vec![Count::default(); tokens];
        Self {
            counts,
            cursors: vec![(0, 0); tokens],
            listed: Vec::new(),
            others: vec![0; tokens + 1],
            len: 0,
            border,
        }
    }

    fn count<T: Token>(&mut self, a: u32, sources: &[&Sorted<T>]) {
        let Self { counts, others, len, .. } = self;
        let mut note = |token: T, below: u64| {
            let token = token.into();
            let count = &mut counts[token as usize];
            others[*len] = token;
            *len += usize::from(count.all == 0);
            count.all += 1;
            count.below += below;
        };
        for &Cell { right, below, .. } in sources.iter().flat_map(|sorted| sorted.of(a)) {
            note(right, 0);
            note(below, 1);
        }
    }

    /// The pairs found, by their second token.
    fn found(&self) -> impl Iterator<Item = (u32, Count)> {
        let others = self.others[..self.len].iter().filter(|&&other| other != self.border);
        others.map(|&other| (other, self.counts[other as usize]))
    }

    /// Lists where pairs at or above the threshold occur.
    fn list<T: Token>(&mut self, a: u32, sources: &[&Sorted<T>], threshold: u64, result: &mut Frequent) {
        let listed: Vec<_> = self.found().filter(|&(_, count)| count.all >= threshold).collect();
        if listed.is_empty() {
            return;
        }
        // Place 0 takes what is not listed: a branch would be guessed wrong half the time.
        let mut end = 1;
        let mut starts = Vec::with_capacity(listed.len());
        for &(other, count) in &listed {
            self.cursors[other as usize] = (end, 1);
            starts.push(end);
            end += count.all as usize;
        }
        self.listed.resize(self.listed.len().max(end), 0);
        let Self { cursors, listed: places, border, .. } = self;
        for (sorted, result) in sources.iter().zip(&mut result.places) {
            let mut list = |token: u32, x: u32| {
                let (cursor, step) = &mut cursors[token as usize];
                places[*cursor] = x;
                *cursor += *step;
            };
            for &Cell { x, right, below } in sorted.of(a) {
                let (right, below) = (right.into(), below.into());
                list(right, x);
                // Once is enough.
                list(if below == right { *border } else { below }, x);
            }
            for (&(other, _), &start) in listed.iter().zip(&starts) {
                let cursor = &mut cursors[other as usize].0;
                if start < *cursor {
                    let list = places[start..*cursor].to_vec();
                    result.push((key(a, other), Places::Cells(list)));
                }
                *cursor = start;
            }
        }
        if places.len() > MOST_KEPT {
            *places = Vec::new();
        }
        for &(other, count) in &listed {
            cursors[other as usize] = (0, 0);
            result.counts.push((key(a, other), count));
        }
    }

    fn clear(&mut self) {
        for &other in &self.others[..self.len] {
            self.counts[other as usize] = Count::default();
        }
        self.len = 0;
    }
}
