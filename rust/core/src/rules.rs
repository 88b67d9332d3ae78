//! Finding the rule for a pair of tokens.

use crate::grid::Offset;
use crate::statistics::key;
use crate::vocabulary::Vocabulary;

/// Marks a place that holds no rule.
const NONE: u32 = u32::MAX;

/// From pairs, and offsets in oriented mode, to rules. Most pairs asked for have none, and a filter small enough for
/// the first-level cache says so at once.
#[derive(Debug)]
pub(crate) struct RuleTable {
    /// Some bits of each pair's hash: a pair whose bit is not set has no rule.
    filter: Vec<u64>,
    filter_shift: u32,
    /// Open addressing: a rule stands at the first free place after where its pair's hash points.
    places: Vec<Place>,
    place_shift: u32,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    key: u64,
    offset: Option<Offset>,
    rule: u32,
}

impl RuleTable {
    pub fn new(vocabulary: &Vocabulary) -> Self {
        let bits = vocabulary.rules().len().next_power_of_two().ilog2();
        let (filter_bits, place_bits) = ((bits + 4).clamp(10, 20), bits + 2);
        let mut table = Self {
            filter: vec![0; 1 << (filter_bits - 6)],
            filter_shift: 64 - filter_bits,
            places: vec![Place { key: 0, offset: None, rule: NONE }; 1 << place_bits],
            place_shift: 64 - place_bits,
        };
        for (index, rule) in (0..).zip(vocabulary.rules()) {
            let key = key(rule.a, rule.b);
            let (word, bit) = table.filter_bit(hash(key));
            table.filter[word] |= bit;
            let mut place = table.first_place(hash(key));
            while table.places[place].rule != NONE {
                place = table.next_place(place);
            }
            table.places[place] = Place { key, offset: rule.offset, rule: index };
        }
        table
    }

    /// The rule for a pair; `offset` is asked for in oriented mode, where the pair's rules differ by it.
    #[inline]
    pub fn get(&self, a: u32, b: u32, offset: impl Fn() -> Offset) -> Option<u32> {
        let key = key(a, b);
        let hash = hash(key);
        let (word, bit) = self.filter_bit(hash);
        if self.filter[word] & bit == 0 {
            return None;
        }
        let mut index = self.first_place(hash);
        loop {
            let place = &self.places[index];
            if place.rule == NONE {
                return None;
            }
            if place.key == key && place.offset.is_none_or(|expected| expected == offset()) {
                return Some(place.rule);
            }
            index = self.next_place(index);
        }
    }

    fn filter_bit(&self, hash: u64) -> (usize, u64) {
        // Other bits than those that choose the place.
        let bit = hash.rotate_left(32) >> self.filter_shift;
        ((bit >> 6) as usize, 1 << (bit & 63))
    }

    fn first_place(&self, hash: u64) -> usize {
        (hash >> self.place_shift) as usize
    }

    fn next_place(&self, place: usize) -> usize {
        (place + 1) & (self.places.len() - 1)
    }
}

fn hash(key: u64) -> u64 {
    let product = (key ^ key >> 32).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    product ^ product >> 32
}
