#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| penstock_lab::fuzzing::any_text(data));
