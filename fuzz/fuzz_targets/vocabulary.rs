//! Any bytes as a vocabulary file.
#![no_main]

#[allow(dead_code, reason = "each target uses a part of it")]
#[path = "../../rust/core/tests/bodies/mod.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| bodies::read_vocabulary(bytes));
