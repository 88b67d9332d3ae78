//! Files, tokens and arrays that were altered or made up are refused or harmless, never a panic. The fuzz targets in
//! `fuzz/` run the same bodies with inputs that libFuzzer looks for.

mod bodies;

use being_vl_core::{Grid, Interrupt, MergeMode, TrainOptions, Vocabulary, train};
use bodies::{decode_any, encode_any, read_vocabulary};
use proptest::prelude::*;

/// A small vocabulary of each mode, learned from stripes and blobs.
fn vocabulary(merge_mode: MergeMode) -> Vocabulary {
    let grids: Vec<Grid> = (0..6_u32)
        .map(|seed| {
            let ids = (0..99_u32).map(|cell| (cell / (seed + 1) + cell % 9 * seed) % 5).collect();
            Grid::new(0, 11, 9, ids).unwrap()
        })
        .collect();
    let options = TrainOptions {
        base_vocab_size: 5,
        num_merges: 40,
        merge_mode,
        num_threads: 1,
        ..TrainOptions::default()
    };
    train(&grids, &options, |_| (), &Interrupt::default()).unwrap()
}

fn files() -> [String; 2] {
    [MergeMode::Pair, MergeMode::Oriented].map(|mode| vocabulary(mode).to_json().unwrap())
}

/// A file as if it had been edited on purpose: without its checksum.
fn without_checksum(text: &str) -> String {
    format!("{}\n}}\n", &text[..text.find(",\n  \"checksum\"").unwrap()])
}

/// A file cut at any place is refused.
#[test]
fn every_truncation_is_refused() {
    for text in files() {
        let length = text.trim_end().len();
        for end in 0..length {
            assert!(Vocabulary::from_json(&text[..end]).is_err(), "cut after {end} of {length} bytes");
        }
        assert!(Vocabulary::from_json(&text[..length]).is_ok());
    }
}

/// One byte changed anywhere to each of the bytes that matter in JSON: if the file has its checksum, it is refused or
/// says the same as before.
#[test]
fn every_byte_may_be_altered() {
    for text in files() {
        let expected = Vocabulary::from_json(&text).unwrap();
        let alter = |text: &str, place: usize, byte| {
            let mut bytes = text.to_owned().into_bytes();
            bytes[place] = byte;
            bytes
        };
        for byte in *b"019-.eE\"\\{}[]:, xn\n\0" {
            for place in 0..text.len() {
                let text_with_byte = String::from_utf8(alter(&text, place, byte)).unwrap();
                if let Ok(vocabulary) = Vocabulary::from_json(&text_with_byte) {
                    assert_eq!(vocabulary, expected, "byte {place}");
                }
            }
            let edited_text = without_checksum(&text);
            (0..edited_text.len()).for_each(|place| read_vocabulary(&alter(&edited_text, place, byte)));
        }
    }
}

/// Numbers far out of range in place of each number of the file.
#[test]
fn every_number_may_be_altered() {
    for text in files().map(|text| without_checksum(&text)) {
        let mut place = 0;
        while let Some(start) = text[place..].find(|c: char| c.is_ascii_digit()).map(|start| place + start) {
            let digits = text[start..].find(|c: char| !c.is_ascii_digit()).unwrap();
            for number in [
                "0",
                "-1",
                "1",
                "32767",
                "65536",
                "4294967295",
                "18446744073709551615",
                "1e400",
                "0.5",
                "null",
            ] {
                read_vocabulary(format!("{}{number}{}", &text[..start], &text[start + digits..]).as_bytes());
            }
            place = start + digits;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Several bytes changed, parts repeated or left out.
    #[test]
    fn mutated_files(
        oriented in any::<bool>(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut text = files()[usize::from(oriented)].clone().into_bytes();
        for (one, other, byte) in edits {
            if text.is_empty() {
                break;
            }
            let (one, other) = (one.index(text.len()), other.index(text.len()));
            let (start, end) = (one.min(other), one.max(other));
            match byte {
                0..=31 => drop(text.drain(start..end)),
                128..=159 => text.extend_from_within(start..end),
                byte => text[start] = byte,
            }
        }
        read_vocabulary(&text);
    }

    /// Any bytes as a grid and options.
    #[test]
    fn any_bytes_are_encoded_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        encode_any(&bytes);
    }

    /// Any numbers as tokens.
    #[test]
    fn any_tokens_are_decoded_or_refused(oriented in any::<bool>(), ids in prop::collection::vec(0..60_u32, 0..40)) {
        let mode = if oriented { MergeMode::Oriented } else { MergeMode::Pair };
        decode_any(&vocabulary(mode), &ids);
    }
}
