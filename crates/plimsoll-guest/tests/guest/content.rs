//! What pages contain: the promised shares, compressibility and distinctness.
use plimsoll_guest::content::{Content, Mix, MixError, PageKind};
use plimsoll_guest::{PAGE_WORDS, PageWords};
use std::collections::{HashMap, HashSet};

const PAGES: u64 = 20_000;

fn page(content: &Content, page: u64, version: u32) -> PageWords {
    let mut words = [0xdead_beef; PAGE_WORDS];
    content.fill(page, version, &mut words);
    words
}

fn of_kind(content: &Content, kind: PageKind) -> impl Iterator<Item = PageWords> {
    (0..PAGES).filter(move |&number| content.kind(number, 1) == kind).map(|number| page(content, number, 1))
}

fn bytes(words: &PageWords) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn lz4_percent(pages: impl Iterator<Item = PageWords>) -> usize {
    let (mut plain, mut packed) = (0, 0);
    let mut room = [0; 2 * PAGE_WORDS * 8];
    for words in pages.take(2000) {
        plain += PAGE_WORDS * 8;
        packed += lz4_flex::block::compress_into(&bytes(&words), &mut room).unwrap();
    }
    packed * 100 / plain
}

#[test]
fn shares_are_within_one_percent_of_the_mix_in_every_version() {
    let mix = Mix { zero: 25, duplicate: 20, text: 45, random: 10 };
    let content = Content::new(1, 2, 100, mix).unwrap();
    for version in [1, 2, 1000] {
        let mut counts: HashMap<PageKind, u64> = HashMap::new();
        for number in 0..PAGES {
            *counts.entry(content.kind(number, version)).or_default() += 1;
        }
        for (kind, percent) in
            [(PageKind::Zero, 25), (PageKind::Duplicate, 20), (PageKind::Text, 45), (PageKind::Random, 10)]
        {
            let permille = counts[&kind] * 1000 / PAGES;
            assert!(permille.abs_diff(percent * 10) <= 10, "{kind:?} {permille} permille, version {version}");
        }
    }
}

#[test]
fn a_page_is_a_function_of_its_arguments_and_version_zero_is_zero() {
    let content = Content::new(1, 2, 100, Mix::default()).unwrap();
    assert_eq!(page(&content, 3, 4), page(&content.clone(), 3, 4));
    assert_eq!(page(&content, 3, 0), [0; PAGE_WORDS]);
}

#[test]
fn text_and_random_pages_are_all_distinct_across_pages_versions_and_machines() {
    let mix = Mix { zero: 0, duplicate: 0, text: 80, random: 20 };
    let mut seen = HashSet::new();
    for seed in [1, 2] {
        let content = Content::new(seed, 9, 1, mix).unwrap();
        for number in 0..1000 {
            for version in 1..4 {
                assert!(seen.insert(bytes(&page(&content, number, version))), "{seed} {number} {version}");
            }
        }
    }
}

#[test]
fn duplicates_come_from_a_pool_that_machines_share() {
    let mix = Mix { zero: 0, duplicate: 100, text: 0, random: 0 };
    let pool = |seed, pool_seed| {
        let content = Content::new(seed, pool_seed, 64, mix).unwrap();
        (0..2000).map(|number| bytes(&page(&content, number, 1))).collect::<HashSet<_>>()
    };
    let here = pool(1, 5);
    assert_eq!(here.len(), 64);
    assert_eq!(here, pool(2, 5));
    assert!(here.is_disjoint(&pool(1, 6)));
}

#[test]
fn text_compresses_like_real_code_and_random_not_at_all() {
    let content = Content::new(1, 2, 1000, Mix::default()).unwrap();
    let text = lz4_percent(of_kind(&content, PageKind::Text));
    let duplicate = lz4_percent(of_kind(&content, PageKind::Duplicate));
    println!("lz4: text {text} %, duplicate {duplicate} %");
    assert!((50..=62).contains(&text), "{text} %");
    assert!((50..=62).contains(&duplicate), "{duplicate} %");
    assert!(lz4_percent(of_kind(&content, PageKind::Random)) >= 100);
    assert!(of_kind(&content, PageKind::Zero).all(|words| words == [0; PAGE_WORDS]));
}

#[test]
fn mixes_read_as_people_write_them() {
    let mix = Mix { zero: 25, duplicate: 20, text: 45, random: 10 };
    assert_eq!("zero=25,dup=20,text=45,random=10".parse(), Ok(mix));
    assert_eq!(" random=10 , text= 45,zero=25,dup=20".parse(), Ok(mix));
    assert_eq!("text=100".parse(), Ok(Mix { zero: 0, duplicate: 0, text: 100, random: 0 }));
    assert_eq!(mix.to_string().parse(), Ok(mix));
}

#[test]
fn malformed_mixes_say_what_is_wrong_with_them() {
    for (text, error) in [
        ("", MixError::NoEqualsSign { position: 1 }),
        ("zero=100,", MixError::NoEqualsSign { position: 2 }),
        ("zero", MixError::NoEqualsSign { position: 1 }),
        ("zero=50,pages=50", MixError::UnknownName { position: 2 }),
        ("zero=half,dup=50", MixError::NotAShare { name: "zero" }),
        ("zero=-1,dup=101", MixError::NotAShare { name: "zero" }),
        ("text=4294967296", MixError::NotAShare { name: "text" }),
        ("zero=50,zero=50", MixError::Twice { name: "zero" }),
        ("zero=25,dup=25", MixError::Sum { found: 50 }),
        ("zero=60,dup=60", MixError::Sum { found: 120 }),
    ] {
        assert_eq!(text.parse::<Mix>(), Err(error), "{text:?}");
        assert!(!error.to_string().is_empty());
    }
}
