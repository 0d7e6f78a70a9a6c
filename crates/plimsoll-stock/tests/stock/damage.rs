//! A verifier that cannot fail verifies nothing: damaged memory and damaged blocks are noticed.
use crate::common::{PATIENCE, alone, ask, can, options, sweep};
use plimsoll_guest::content::{Content, PageKind};
use plimsoll_stock::{Command, Disk, Guest, content};
use plimsoll_sys::HvaRange;
use plimsoll_sys::process_memory;
use plimsoll_types::{ByteCount, Hva, PAGE_SIZE};
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Instant;

const PAGES: u64 = 8000;
const WORD: usize = 77;

/// Where a page with these contents lies in the guest's RAM; there must be one.
fn find_page(guest: &Guest, wanted: &[u64; 512]) -> Hva {
    let wanted: Vec<u8> = wanted.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let mut found = Vec::new();
    let mut bytes = vec![0; 1 << 20];
    for range in guest.ram().unwrap() {
        let mut rest = range;
        while !rest.is_empty() {
            let length = ByteCount(rest.len().0.min(1 << 20));
            let piece = HvaRange::new(rest.start(), length).unwrap();
            let bytes = &mut bytes[..usize::try_from(length.0).unwrap()];
            assert_eq!(process_memory::read(guest.process(), piece.start(), bytes).stop, None);
            let pages = bytes.chunks_exact(PAGE_SIZE).enumerate().filter(|(_, page)| *page == wanted);
            found.extend(pages.map(|(place, _)| Hva(piece.start().0 + (place * PAGE_SIZE) as u64)));
            rest = rest.skip(length).unwrap();
        }
    }
    assert_eq!(found.len(), 1, "{found:?}");
    found[0]
}

/// A page that no other equals.
fn unique_page(content: &Content) -> u64 {
    (PAGES / 2..PAGES).find(|&page| content.kind(page, 1) == PageKind::Text).unwrap()
}

#[test]
fn a_word_changed_behind_the_guests_back_is_noticed() {
    if !can(&["qemu", "cloud-kernel", "root"]) {
        return;
    }
    let _alone = alone();
    let mut options = options(11);
    options.work = vec![Command::Alloc { pages: PAGES }];
    let content = content(options.seed, options.mix).unwrap();
    let mut guest = Guest::start(options).unwrap();
    assert_eq!(sweep(&mut guest), 0);

    let page = unique_page(&content);
    let mut words = [0; 512];
    content.fill(page, 1, &mut words);
    let address = find_page(&guest, &words);
    let memory = OpenOptions::new().write(true).open(format!("/proc/{}/mem", guest.process().get())).unwrap();
    let wrong = words[WORD] ^ (1 << 40);
    memory.write_all_at(&wrong.to_ne_bytes(), address.0 + 8 * WORD as u64).unwrap();

    assert_eq!(sweep(&mut guest), 1);
    let [told] = guest.console().wrongs() else { panic!("{:?}", guest.console().wrongs()) };
    assert!(told.starts_with(&format!("memory number={page} ")), "{told}");
    assert!(told.ends_with(&format!("word={WORD} found={wrong} expected={}", words[WORD])), "{told}");
    // Writing the page anew mends it, and what was wrong stays counted.
    ask(&mut guest, Command::Fill);
    assert_eq!(sweep(&mut guest), 0);
    assert_eq!(guest.console().report(PATIENCE).unwrap().wrong, 1);
}

#[test]
fn a_block_changed_on_the_disk_is_noticed() {
    if !can(&["qemu", "cloud-kernel"]) {
        return;
    }
    let _alone = alone();
    let mut options = options(12);
    let disk = Arc::new(Disk::create(ByteCount(64 << 12), 12).unwrap());
    options.disk = Some(Arc::clone(&disk));
    let mut guest = Guest::start(options).unwrap();
    ask(&mut guest, Command::Disk { per_second: 500 });
    let deadline = Instant::now() + PATIENCE;
    loop {
        let report = guest.console().report(PATIENCE).unwrap();
        assert_eq!(report.wrong, 0, "{:?}", guest.console().wrongs());
        if report.disk_reads > 200 {
            break;
        }
        assert!(Instant::now() < deadline, "{report:?}");
    }
    // Some will be overwritten before they are read; not all of them.
    (0..16).for_each(|block| disk.corrupt(block).unwrap());
    while guest.console().report(PATIENCE).unwrap().wrong == 0 {
        assert!(Instant::now() < deadline);
    }
    let told = &guest.console().wrongs()[0];
    assert!(told.starts_with("disk number=") && told.contains(" word=0 "), "{told}");
}
