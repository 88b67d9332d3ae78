//! Counting all pairs of adjacent regions.
//!
//! There are too many pairs to count each exactly, so they are counted twice:
//! 1. A [`Sketch`] counts them by a hash, in a table of fixed size, which gives upper bounds of their counts.
//! 2. [`count_frequent`] counts exactly those pairs whose bound reaches the threshold, and lists where they occur.

use super::neighbours::Neighbours;
use super::occurrences::{Occurrences, pack};
use super::pair::Count;
use super::regions::RegionMap;
use super::word::Word;
use crate::error::Result;
use crate::interrupt::Interrupt;
use crate::memory::{self, Number};
use crate::statistics::{key, tokens};

/// Pairs are sorted into this number of buckets before they are counted, by the high bits of their hash, so that the counts
/// that a bucket needs stay in the nearer caches.
const NUM_BUCKETS: usize = 64;

/// Most pairs in a bucket.
const MAX_BUCKET_SIZE: usize = 1 << 14;

/// Positions between two looks at the interrupt flag.
const CHECK_INTERVAL: usize = 1 << 18;

/// What memory is for, in messages.
const COUNTS: &str = "the counts of pairs";

/// A hash whose high bits depend on all bits of the tokens.
#[inline]
fn hash(a: u32, b: u32) -> u32 {
    let product = |token: u32, factor: u64| u64::from(token).wrapping_mul(factor);
    (product(a, 0x9E37_79B9_7F4A_7C15).wrapping_add(product(b, 0xC2B2_AE3D_27D4_EB4F)) >> 32) as u32
}

/// The high bits of a hash.
#[inline]
fn high_bits(hash: u32, bits: u32) -> usize {
    (hash >> (u32::BITS - bits)) as usize
}

/// Items sorted by the high bits of a hash into buckets, each of which is counted whenever it is full.
struct Buckets<T> {
    items: Vec<T>,
    lens: [usize; NUM_BUCKETS],
    size: usize,
}

impl<T: Number> Buckets<T> {
    /// For about twice as many items as there are cells.
    fn new(cells: usize) -> Result<Self> {
        // Larger buckets count more pairs of a kind at a time, but all should take little memory beside the cells.
        let size = (cells / 512).clamp(16, MAX_BUCKET_SIZE);
        Ok(Self { items: memory::zeros(NUM_BUCKETS * size, COUNTS)?, lens: [0; NUM_BUCKETS], size })
    }

    /// Adds an item if `keep` is true, branchless; calls `count` for the items of the bucket if it is full.
    #[inline]
    fn push(&mut self, hash: u32, item: T, keep: bool, count: &mut impl FnMut(&[T])) {
        let bucket = high_bits(hash, NUM_BUCKETS.ilog2());
        let len = &mut self.lens[bucket];
        self.items[bucket * self.size + *len] = item;
        *len += usize::from(keep);
        if *len == self.size {
            *len = 0;
            count(&self.items[bucket * self.size..][..self.size]);
        }
    }

    /// Calls `count` for the items that remain.
    fn finish(self, mut count: impl FnMut(&[T])) {
        for (bucket, len) in self.lens.into_iter().enumerate() {
            count(&self.items[bucket * self.size..][..len]);
        }
    }
}

/// Upper bounds of the counts of pairs: by hash, how many sides of cells lie between regions of a pair with this hash.
#[derive(Debug, Clone, Default)]
pub(super) struct Sketch {
    bits: u32,
    counts: Vec<u32>,
}

impl Sketch {
    /// Counts all pairs by a hash of `bits` bits.
    pub fn new<W: Word>(regions: &RegionMap<W>, bits: u32, interrupt: &Interrupt) -> Result<Self> {
        let mut counts = memory::zeros::<u32>(1 << bits, COUNTS)?;
        let mut buckets = Buckets::<u32>::new(regions.len())?;
        let mut count = |hashes: &[u32]| hashes.iter().for_each(|&hash| counts[high_bits(hash, bits)] += 1);
        for (from, to) in ranges(regions.len(), interrupt) {
            regions.for_each_side(from, to, &mut |a, b, two_regions| {
                let hash = hash(a, b);
                buckets.push(hash, hash, two_regions, &mut count);
            });
        }
        buckets.finish(count);
        Ok(Self { bits, counts })
    }

    /// The sum of sketches of as many bits.
    pub fn sum<'a>(mut sketches: impl Iterator<Item = &'a Self>) -> Result<Self> {
        let Some(Self { bits, counts }) = sketches.next() else { return Ok(Self::default()) };
        let mut sum = Self { bits: *bits, counts: memory::collect(counts.iter().copied(), COUNTS)? };
        for sketch in sketches {
            for (sum, count) in sum.counts.iter_mut().zip(&sketch.counts) {
                *sum = sum.saturating_add(*count);
            }
        }
        Ok(sum)
    }

    /// How many bounds reach a threshold.
    pub fn num_reaching(&self, threshold: u64) -> usize {
        self.counts.iter().filter(|&&count| u64::from(count) >= threshold).count()
    }

    /// The least threshold that at most `max_reaching` bounds reach.
    pub fn threshold(&self, max_reaching: usize) -> Result<u64> {
        let mut largest_counts: Vec<u32> = Vec::new();
        // All bounds above this one are in `largest_counts`, which is cut whenever it is twice as long as needed.
        let mut cutoff = 0;
        for &count in &self.counts {
            if count > cutoff {
                memory::push(&mut largest_counts, count, COUNTS)?;
                if largest_counts.len() > 2 * max_reaching {
                    cutoff = nth_largest(&mut largest_counts, max_reaching);
                    largest_counts.truncate(max_reaching);
                }
            }
        }
        if largest_counts.len() > max_reaching {
            cutoff = nth_largest(&mut largest_counts, max_reaching);
        }
        Ok(u64::from(cutoff) + 1)
    }

    /// One bit per hash: whether its bound reaches the threshold.
    pub fn bits_reaching(&self, threshold: u64) -> Result<Vec<u64>> {
        let word = |counts: &[u32]| {
            counts.iter().rev().fold(0, |word, &count| word << 1 | u64::from(u64::from(count) >= threshold))
        };
        memory::collect(self.counts.chunks(64).map(word), COUNTS)
    }
}

/// The number with `n` others before it in descending order; puts those before it first.
fn nth_largest(numbers: &mut [u32], n: usize) -> u32 {
    let (_, &mut number, _) = numbers.select_nth_unstable_by(n, |a, b| b.cmp(a));
    number
}

/// A pair counted exactly.
#[derive(Debug)]
pub(super) struct CountedPair {
    pub key: u64,
    pub count: Count,
    pub occurrences: Occurrences,
}

/// An occurrence of a pair: its tokens and anchors, a, b, x and y.
type Occurrence = [u32; 4];

/// The content of a free slot.
const EMPTY_SLOT: u32 = u32::MAX;

/// The pairs counted so far, and a hash table of them: the number of a pair is in the first free slot at or after the
/// one that its hash names.
struct Table<'a> {
    /// Bounds of their counts.
    sketch: &'a Sketch,
    base_vocab_size: u32,
    pairs: Vec<CountedPair>,
    slots: Vec<u32>,
    bits: u32,
    /// Whether there was memory for all pairs so far.
    memory: Result<()>,
}

impl<'a> Table<'a> {
    /// For pairs of about `hashes` hashes. A bucket of pairs fills one part of the table, so the table has room to spare.
    fn new(sketch: &'a Sketch, base_vocab_size: u32, hashes: u32) -> Result<Self> {
        let bits = (4 * hashes).max(1 << 10).ilog2() + 2;
        let slots = memory::try_vec(1 << bits, EMPTY_SLOT, COUNTS)?;
        Ok(Self { sketch, base_vocab_size, pairs: Vec::new(), slots, bits, memory: Ok(()) })
    }

    /// Counts the occurrences in a bucket, or nothing any more once there was no memory.
    fn count(&mut self, bucket: &[Occurrence]) {
        if self.memory.is_ok() {
            self.memory = self.try_count(bucket);
        }
    }

    fn try_count(&mut self, bucket: &[Occurrence]) -> Result<()> {
        for &[a, b, x, y] in bucket {
            let number = self.find_or_insert(a, b)?;
            let CountedPair { count, occurrences, .. } = &mut self.pairs[number as usize];
            *count += Count { total: 1, below: u64::from(y != x + 1) };
            match occurrences {
                Occurrences::Regions(anchors) => anchors.push(pack(x, y)),
                // A cell is listed once, even if one of the pair lies right of it and another below it. Branchless.
                Occurrences::Cells(positions) => {
                    let is_listed = positions.last() == Some(&x);
                    positions.push(x);
                    positions.truncate(positions.len() - usize::from(is_listed));
                }
            }
        }
        Ok(())
    }

    #[inline]
    fn find_or_insert(&mut self, a: u32, b: u32) -> Result<u32> {
        // Follow the slots from the hash on, up to the pair or a free one.
        let (key, hash) = (key(a, b), hash(a, b));
        let mut slot = high_bits(hash, self.bits);
        loop {
            let number = self.slots[slot];
            if number == EMPTY_SLOT {
                return self.insert(slot, key, hash);
            }
            if self.pairs[number as usize].key == key {
                return Ok(number);
            }
            slot = (slot + 1) & (self.slots.len() - 1);
        }
    }

    #[cold]
    fn insert(&mut self, slot: usize, key: u64, hash: u32) -> Result<u32> {
        let number = self.pairs.len() as u32;
        self.slots[slot] = number;
        // The sketch bounds how many occurrences there will be, so the list need not grow.
        let capacity = self.sketch.counts[high_bits(hash, self.sketch.bits)] as usize;
        let (a, b) = tokens(key);
        let occurrences = if a.max(b) < self.base_vocab_size {
            Occurrences::Cells(memory::with_capacity(capacity, COUNTS)?)
        } else {
            Occurrences::Regions(memory::with_capacity(capacity, COUNTS)?)
        };
        memory::push(&mut self.pairs, CountedPair { key, count: Count::default(), occurrences }, COUNTS)?;
        // At most half of the slots are in use, so that a free one is near.
        if 2 * self.pairs.len() > self.slots.len() {
            self.grow()?;
        }
        Ok(number)
    }

    fn grow(&mut self) -> Result<()> {
        self.bits += 1;
        self.slots = memory::try_vec(1 << self.bits, EMPTY_SLOT, COUNTS)?;
        // Put all pairs into the new slots.
        for (number, pair) in (0..).zip(&self.pairs) {
            let (a, b) = tokens(pair.key);
            let mut slot = high_bits(hash(a, b), self.bits);
            while self.slots[slot] != EMPTY_SLOT {
                slot = (slot + 1) & (self.slots.len() - 1);
            }
            self.slots[slot] = number;
        }
        Ok(())
    }
}

/// Counts exactly those pairs whose hash has a bit in `frequent_hashes`. The sketch is of these regions alone, each of
/// which has at most `max_cells` cells.
pub(super) fn count_frequent<W: Word>(
    regions: &mut RegionMap<W>,
    sketch: &Sketch,
    frequent_hashes: &[u64],
    max_cells: usize,
    interrupt: &Interrupt,
) -> Result<Vec<CountedPair>> {
    // One entry per frequent hash; more than one pair may have it.
    let hashes = frequent_hashes.iter().map(|word| word.count_ones()).sum();
    let mut table = Table::new(sketch, regions.base_vocab_size, hashes)?;
    let mut buckets = Buckets::<Occurrence>::new(regions.len())?;
    let mut neighbours = Neighbours::default();
    neighbours.reserve(max_cells)?;
    for (from, to) in ranges(regions.len(), interrupt) {
        regions.for_each_pair(from, to, &mut neighbours, &mut |x, y, a, b| {
            let hash = hash(a, b);
            // Only pairs whose bound reaches the threshold.
            let bit = high_bits(hash, sketch.bits);
            let reaches = frequent_hashes[bit / 64] >> (bit % 64) & 1 != 0;
            buckets.push(hash, [a, b, x, y], reaches, &mut |bucket| table.count(bucket));
        });
    }
    buckets.finish(|bucket| table.count(bucket));
    neighbours.check()?;
    table.memory?;
    Ok(table.pairs)
}

/// Ranges that cover `len` positions, or fewer if the interrupt flag is set on the way.
fn ranges(len: usize, interrupt: &Interrupt) -> impl Iterator<Item = (usize, usize)> {
    let ranges = (0..len).step_by(CHECK_INTERVAL).map(move |from| (from, len.min(from + CHECK_INTERVAL)));
    ranges.take_while(|_| !interrupt.is_set())
}
