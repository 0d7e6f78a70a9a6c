//! Guests that execute what is known only, and that seal what they have written.
use crate::common::{caller, can, greedy, run};
use plimsoll_metal::{Digest, Guest, Options};
use plimsoll_types::ByteCount;

/// The page of code that the program writes: mov eax, 42; ret; and breakpoints.
fn code() -> Digest {
    let mut page = [0xcc; 4096];
    page[..6].copy_from_slice(&[0xb8, 42, 0, 0, 0, 0xc3]);
    Digest::of(&page)
}

#[test]
fn known_code_runs_whenever_it_is_what_it_was_and_sealed_memory_stays_what_it_is() {
    if !can() {
        return;
    }
    let strict = |name, seed| Guest { code: Some(vec![code()]), ..caller(name, seed) };
    let mut options = Options::new(ByteCount::mib(40));
    // Who waits longer says so.
    options.seconds = 600;
    options.guests =
        vec![strict("known", 10), strict("unknown", 11), strict("sealer", 12), caller("free", 12), greedy()];
    let heard = run(&options);
    heard.assert_sound();
    let guests: Vec<_> = heard.guests().collect();
    let [known, unknown, sealer, free, greedy] = guests.as_slice() else { panic!("{heard:#?}") };
    // It was taken twice and looked at again.
    assert_eq!((&known.died, known.refused_accesses), (&None, 0), "{heard:#?}");
    assert!(known.verified_code_pages >= known.verified_pages && known.captured_pages > 0, "{heard:#?}");
    let died = unknown.died.as_deref().unwrap_or_default();
    assert_eq!(died, "it executed gpa:0x800000, in a page whose bytes are on no list of its", "{heard:#?}");
    assert_eq!(unknown.refused_accesses, 1, "{heard:#?}");
    for sealer in [sealer, free] {
        let died = sealer.died.as_deref().unwrap_or_default();
        // The last word of a page that was away.
        let of_that =
            died.starts_with("it would have changed gpa:0x") && died.ends_with("ff8, which it had sealed");
        assert!(of_that, "{heard:#?}");
        // To give it back, and to write it.
        assert!(sealer.refused_accesses == 2 && sealer.captured_pages > 0, "{heard:#?}");
    }
    assert_eq!(free.verified_code_pages, 0, "nobody looks at what it executes: {heard:#?}");
    assert_eq!((&greedy.died, greedy.wrong_words), (&None, 0), "{heard:#?}");
}
