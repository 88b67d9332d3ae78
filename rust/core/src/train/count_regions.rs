//! Counting all pairs of adjacent regions: first by hash, then exactly those that may be frequent.

use std::ops::{AddAssign, SubAssign};

use super::occurrences::{Places, pack};
use super::regions::{Canvas, Word};
use crate::interrupt::Interrupt;
use crate::statistics::{key, tokens};

/// Parts that frequent pairs are sorted into before they are counted, by the high bits of their hash, so that what a
/// part needs stays in the nearer caches.
const PARTS: usize = 64;

/// Most pairs that a part takes.
const PART_SIZE: usize = 1 << 14;

/// Cells between two looks at the interrupt flag.
const PIECE: usize = 1 << 18;

/// A hash whose high bits are spread well.
#[inline]
fn hash(a: u32, b: u32) -> u32 {
    let product = |token: u32, factor: u64| u64::from(token).wrapping_mul(factor);
    (product(a, 0x9E37_79B9_7F4A_7C15).wrapping_add(product(b, 0xC2B2_AE3D_27D4_EB4F)) >> 32) as u32
}

/// The high bits of a hash.
#[inline]
fn high(hash: u32, bits: u32) -> usize {
    (hash >> (u32::BITS - bits)) as usize
}

/// Items sorted by the high bits of a hash into parts, which are taken whenever they are full.
struct Parts<T> {
    items: Vec<T>,
    lens: [usize; PARTS],
    size: usize,
}

impl<T: Copy + Default> Parts<T> {
    /// For about twice as many items as there are cells.
    fn new(cells: usize) -> Self {
        // Longer parts serve more pairs of a kind at a time, and in all they should take little memory beside the cells.
        let size = (cells / 512).clamp(16, PART_SIZE);
        Self { items: vec![T::default(); PARTS * size], lens: [0; PARTS], size }
    }

    /// Adds an item if it is `kept`. It is written in any case: a branch would be guessed wrong half the time.
    #[inline]
    fn push(&mut self, hash: u32, item: T, kept: bool, take: &mut impl FnMut(&[T])) {
        let part = high(hash, PARTS.ilog2());
        let len = &mut self.lens[part];
        self.items[part * self.size + *len] = item;
        *len += usize::from(kept);
        if *len == self.size {
            *len = 0;
            take(&self.items[part * self.size..][..self.size]);
        }
    }

    /// Takes what is left.
    fn finish(self, mut take: impl FnMut(&[T])) {
        for (part, len) in self.lens.into_iter().enumerate() {
            take(&self.items[part * self.size..][..len]);
        }
    }
}

/// Upper bounds of the counts of pairs: how many sides of cells have pairs of this hash.
#[derive(Debug, Clone, Default)]
pub(super) struct Sketch {
    bits: u32,
    counts: Vec<u32>,
}

impl Sketch {
    /// Counts all pairs by a hash of so many bits.
    pub fn new<W: Word>(canvas: &Canvas<W>, bits: u32, interrupt: &Interrupt) -> Self {
        let mut counts = vec![0_u32; 1 << bits];
        let mut parts = Parts::new(canvas.len());
        let mut count = |hashes: &[u32]| hashes.iter().for_each(|&hash| counts[high(hash, bits)] += 1);
        for (from, to) in pieces(canvas.len(), interrupt) {
            canvas.for_each_side(from, to, &mut |a, b, of_two| {
                let hash = hash(a, b);
                parts.push(hash, hash, of_two, &mut count);
            });
        }
        parts.finish(count);
        Self { bits, counts }
    }

    /// The sum of sketches of as many bits.
    pub fn sum<'a>(mut sketches: impl Iterator<Item = &'a Self>) -> Self {
        let mut sum = sketches.next().cloned().unwrap_or_default();
        for sketch in sketches {
            for (sum, count) in sum.counts.iter_mut().zip(&sketch.counts) {
                *sum = sum.saturating_add(*count);
            }
        }
        sum
    }

    /// How many bounds reach a threshold.
    pub fn count(&self, threshold: u64) -> usize {
        self.counts.iter().filter(|&&count| u64::from(count) >= threshold).count()
    }

    /// The least threshold that at most `wanted` bounds reach.
    pub fn threshold(&self, wanted: usize) -> u64 {
        let mut largest: Vec<u32> = Vec::new();
        let mut least = 0;
        for &count in &self.counts {
            if count > least {
                largest.push(count);
                if largest.len() > 2 * wanted {
                    let (_, &mut reached, _) =
                        largest.select_nth_unstable_by(wanted, |one, other| other.cmp(one));
                    least = reached;
                    largest.truncate(wanted);
                }
            }
        }
        if largest.len() > wanted {
            let (_, &mut reached, _) = largest.select_nth_unstable_by(wanted, |one, other| other.cmp(one));
            least = reached;
        }
        u64::from(least) + 1
    }

    /// One bit per hash: whether its bound reaches the threshold.
    pub fn reaching(&self, threshold: u64) -> Vec<u64> {
        let word = |counts: &[u32]| {
            counts.iter().rev().fold(0, |word, &count| word << 1 | u64::from(u64::from(count) >= threshold))
        };
        self.counts.chunks(64).map(word).collect()
    }
}

/// A pair counted exactly.
#[derive(Debug)]
pub(super) struct Counted {
    pub key: u64,
    pub count: Count,
    pub places: Places,
}

/// How often a pair occurs.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Count {
    pub all: u64,
    /// How often the second lies below the first rather than right of it. Only kept up to date for two single cells of
    /// the codebook's tokens, whose histogram this is.
    pub below: u64,
}

impl AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        self.all += other.all;
        self.below += other.below;
    }
}

impl SubAssign for Count {
    fn sub_assign(&mut self, other: Self) {
        self.all -= other.all;
        // Of other pairs than of single cells it means nothing.
        self.below = self.below.wrapping_sub(other.below);
    }
}

/// An occurrence of a pair: its tokens and anchors.
#[derive(Debug, Clone, Copy, Default)]
struct Occurrence {
    a: u32,
    b: u32,
    x: u32,
    y: u32,
}

/// No pair.
const NONE: u32 = u32::MAX;

/// The pairs counted so far, and a hash table of where they are. A pair stands in the first free slot after where its
/// hash points.
struct Table<'a> {
    /// Bounds of their counts.
    sketch: &'a Sketch,
    base_vocab_size: u32,
    pairs: Vec<Counted>,
    slots: Vec<u32>,
    bits: u32,
}

impl<'a> Table<'a> {
    /// For pairs of about so many hashes. Parts come one after the other, so a smaller table would be full in one place.
    fn new(sketch: &'a Sketch, base_vocab_size: u32, hashes: u32) -> Self {
        let bits = (4 * hashes).max(1 << 10).ilog2() + 2;
        Self { sketch, base_vocab_size, pairs: Vec::new(), slots: vec![NONE; 1 << bits], bits }
    }

    fn count(&mut self, occurrences: &[Occurrence]) {
        for &Occurrence { a, b, x, y } in occurrences {
            let number = self.find(a, b);
            let Counted { count, places, .. } = &mut self.pairs[number as usize];
            *count += Count { all: 1, below: u64::from(y != x + 1) };
            match places {
                Places::Regions(places) => places.push(pack(x, y)),
                Places::Cells(places) => {
                    let there = places.last() == Some(&x);
                    places.push(x);
                    places.truncate(places.len() - usize::from(there));
                }
            }
        }
    }

    #[inline]
    fn find(&mut self, a: u32, b: u32) -> u32 {
        let (key, hash) = (key(a, b), hash(a, b));
        let mut slot = high(hash, self.bits);
        loop {
            let number = self.slots[slot];
            if number == NONE {
                return self.insert(slot, key, hash);
            }
            if self.pairs[number as usize].key == key {
                return number;
            }
            slot = (slot + 1) & (self.slots.len() - 1);
        }
    }

    #[cold]
    fn insert(&mut self, slot: usize, key: u64, hash: u32) -> u32 {
        let number = self.pairs.len() as u32;
        self.slots[slot] = number;
        let capacity = self.sketch.counts[high(hash, self.sketch.bits)] as usize;
        let (a, b) = tokens(key);
        let places = if a.max(b) < self.base_vocab_size {
            Places::Cells(Vec::with_capacity(capacity))
        } else {
            Places::Regions(Vec::with_capacity(capacity))
        };
        self.pairs.push(Counted { key, count: Count::default(), places });
        if 2 * self.pairs.len() > self.slots.len() {
            self.grow();
        }
        number
    }

    fn grow(&mut self) {
        self.bits += 1;
        self.slots = vec![NONE; 1 << self.bits];
        for (number, pair) in (0..).zip(&self.pairs) {
            let (a, b) = tokens(pair.key);
            let mut slot = high(hash(a, b), self.bits);
            while self.slots[slot] != NONE {
                slot = (slot + 1) & (self.slots.len() - 1);
            }
            self.slots[slot] = number;
        }
    }
}

/// Counts exactly those pairs for which `reaching` has a bit. The sketch is of this canvas alone.
pub(super) fn count<W: Word>(
    canvas: &mut Canvas<W>,
    sketch: &Sketch,
    reaching: &[u64],
    interrupt: &Interrupt,
) -> Vec<Counted> {
    let hashes = reaching.iter().map(|word| word.count_ones()).sum();
    let mut table = Table::new(sketch, canvas.base_vocab_size, hashes);
    let mut parts = Parts::new(canvas.len());
    for (from, to) in pieces(canvas.len(), interrupt) {
        canvas.for_each_pair(from, to, &mut |x, y, a, b| {
            let hash = hash(a, b);
            let place = high(hash, sketch.bits);
            let reaches = reaching[place / 64] >> (place % 64) & 1 != 0;
            parts.push(hash, Occurrence { a, b, x, y }, reaches, &mut |part| table.count(part));
        });
    }
    parts.finish(|occurrences| table.count(occurrences));
    table.pairs
}

/// Ranges of positions, until there is no more or somebody asks to stop.
fn pieces(len: usize, interrupt: &Interrupt) -> impl Iterator<Item = (usize, usize)> {
    let pieces = (0..len).step_by(PIECE).map(move |from| (from, len.min(from + PIECE)));
    pieces.take_while(|_| !interrupt.is_set())
}
