//! One machine, attached to, squeezed, and left again.
use crate::manager::{Manager, PATIENCE, STOCK, alone, ask, bytes, can, swap, sweep, taken};
use plimsoll_guest::random::Rng;
use plimsoll_stock::{Backing, Command, Disk, Guest, Libvirt, Options};
use plimsoll_types::ByteCount;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A guest that works: 48 MiB of pages of which a tenth is hot, and a disk.
fn working(seed: u64) -> Options {
    let mut options = Options::new(ByteCount::mib(192));
    options.seed = seed;
    options.disk = Some(Arc::new(Disk::create(ByteCount::mib(16), seed).unwrap()));
    options.work = vec![
        Command::Alloc { pages: 12_000 },
        Command::Hot { pages: 1200, per_second: 500 },
        Command::Disk { per_second: 50 },
    ];
    options
}

fn process(guest: &Guest) -> String {
    guest.process().get().to_string()
}

/// What an idle guest of 512 MiB may take in RAM and compressed memory. With recompression, which this project's zram swap does
/// not set up, it would be 48 MiB.
const SMALL: ByteCount = ByteCount::mib(64);
/// How long it may take to answer when it is touched then.
const ANSWERS_WITHIN: Duration = Duration::from_secs(2);
/// How often it is asked once more.
const TRIES: u32 = 4;

/// A manager that knows nothing of the guest but its name brings it down to that, and it answers.
fn ends_small(guest: &mut Guest, name: &str) {
    let mut manager = Manager::attach(&[name, "--budget", "auto"]);
    let first = manager.period();
    let mut since = 0.0;
    let mut answers = || {
        let small = manager.until("the guest to be small", |line| {
            let is_later = line["event"] == "period" && line["seconds"].as_f64().unwrap() >= since;
            is_later && taken(line) <= SMALL && bytes(line, "taken_pages") > 0
        });
        let asked = Instant::now();
        ask(guest, Command::Ping);
        let answered = asked.elapsed();
        println!(
            "took {} at first, {} after {} s ({} in RAM, {} in swap as {}); answered in {} ms",
            taken(&first),
            taken(&small),
            small["seconds"],
            ByteCount(bytes(&small, "resident_bytes")),
            ByteCount(bytes(&small, "elsewhere_bytes")),
            ByteCount(bytes(&small, "compressed_bytes")),
            answered.as_millis()
        );
        // What was touched is to be taken again.
        since = small["seconds"].as_f64().unwrap() + answered.as_secs_f64() + 10.0;
        answered
    };
    // Where this machine was busy with something else it is asked anew.
    let mut answered = answers();
    for _ in 0..TRIES {
        if answered < ANSWERS_WITHIN {
            break;
        }
        answered = answers();
    }
    assert!(answered < ANSWERS_WITHIN, "{answered:?}");
    assert_eq!(manager.interrupt()["how"], "interrupted");
    sweep(guest);
}

fn idle(backing: Backing) -> Options {
    let mut options = Options::new(ByteCount::mib(512));
    options.nodes.iter_mut().for_each(|node| node.backing = backing);
    options
}

#[test]
fn an_idle_guest_ends_small_and_answers_at_once_when_touched() {
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let _swap = swap(ByteCount::mib(1024));
    let mut guest = Guest::start(idle(Backing::Anonymous)).unwrap();
    let name = process(&guest);
    ends_small(&mut guest, &name);
}

#[test]
fn an_idle_guest_in_a_memfd_ends_small_and_answers_at_once_when_touched() {
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let _swap = swap(ByteCount::mib(1024));
    let mut guest = Guest::start(idle(Backing::Memfd)).unwrap();
    let name = process(&guest);
    ends_small(&mut guest, &name);
}

#[test]
fn an_idle_guest_of_libvirts_ends_small_and_answers_at_once_when_touched() {
    if !can(&["qemu", "libvirt", "cloud-kernel", "root", "zram"]) {
        return;
    }
    let _alone = alone();
    let libvirt = Libvirt::start().unwrap();
    let _swap = swap(ByteCount::mib(1024));
    let mut guest = Guest::start_domain(&libvirt, idle(Backing::Anonymous)).unwrap();
    let name = guest.domain().unwrap().to_owned();
    ends_small(&mut guest, &name);
}

/// Managers are killed at random instants while the guest works and is taken from: it goes on, and nothing in it is wrong.
fn survives_kills(guest: &mut Guest, name: &str, seed: u64) {
    const KILLS: u32 = 12;
    /// A manager samples, takes, looks and waits within this.
    const LIVES_MS_MAX: u64 = 3000;
    let mut rng = Rng::new(seed);
    let (mut all, mut before) = (0, guest.console().report(PATIENCE).unwrap());
    for _ in 0..KILLS {
        let mut manager = Manager::attach(&[name, "--budget", "48M"]);
        manager.until("to be attached", |line| line["event"] == "attached");
        std::thread::sleep(Duration::from_millis(rng.below(LIVES_MS_MAX)));
        let lines = manager.kill();
        all += lines
            .iter()
            .rev()
            .find(|line| line["event"] == "period")
            .map_or(0, |line| bytes(line, "taken_pages"));
        let now = guest.console().report(PATIENCE).unwrap();
        assert!(now.operations > before.operations && now.wrong == 0, "seed {seed}: {before:?} {now:?}");
        before = now;
    }
    println!(
        "seed {seed}: {KILLS} managers killed; {all} pages taken by them; {} operations",
        before.operations
    );
    assert!(all > 4000, "seed {seed}: only {all} pages were taken");
    sweep(guest);
}

#[test]
fn a_machine_notices_nothing_when_its_managers_are_killed() {
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let _swap = swap(ByteCount::mib(512));
    let mut guest = Guest::start(working(41)).unwrap();
    let name = process(&guest);
    survives_kills(&mut guest, &name, 41);
}

#[test]
fn a_machine_in_a_memfd_notices_nothing_when_its_managers_are_killed() {
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let _swap = swap(ByteCount::mib(512));
    let mut options = working(44);
    options.nodes.iter_mut().for_each(|node| node.backing = Backing::Memfd);
    let mut guest = Guest::start(options).unwrap();
    let name = process(&guest);
    survives_kills(&mut guest, &name, 44);
}

#[test]
fn a_domain_of_libvirts_notices_nothing_when_its_managers_are_killed() {
    if !can(&["qemu", "libvirt", "cloud-kernel", "root", "zram"]) {
        return;
    }
    let _alone = alone();
    let libvirt = Libvirt::start().unwrap();
    let _swap = swap(ByteCount::mib(512));
    let mut guest = Guest::start_domain(&libvirt, working(45)).unwrap();
    let name = guest.domain().unwrap().to_owned();
    survives_kills(&mut guest, &name, 45);
}

#[test]
fn a_second_manager_is_refused_and_told_who_the_first_is() {
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let guest = Guest::start(Options::new(ByteCount::mib(192))).unwrap();
    let mut first = Manager::attach(&[&process(&guest)]);
    let attached = first.until("to be attached", |line| line["event"] == "attached");
    assert_eq!(attached["machine"]["vmm"], "qemu");
    let (status, lines, words) = Manager::attach(&[&process(&guest)]).end();
    assert_eq!((status.code(), lines), (Some(2), Vec::new()));
    assert!(words.contains("already") && words.contains("pid"), "{words}");
    // Its lock went with it.
    first.kill();
    let mut third = Manager::attach(&[&process(&guest)]);
    third.until("to be attached", |line| line["event"] == "attached");
    third.interrupt();
}

#[test]
fn a_machine_that_ends_ends_its_management_and_is_no_failure() {
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let guest = Guest::start(Options::new(ByteCount::mib(192))).unwrap();
    let mut manager = Manager::attach(&[&process(&guest)]);
    manager.until("to be attached", |line| line["event"] == "attached");
    drop(guest);
    let ended = manager.until("its end", |line| line["event"] == "ended");
    assert_eq!(ended["how"], "gone");
    assert!(manager.end().0.success());
}

#[test]
fn a_domain_of_libvirts_is_attached_to_by_its_name() {
    if !can(&["qemu", "libvirt", "cloud-kernel", "root", "zram"]) {
        return;
    }
    let _alone = alone();
    let libvirt = Libvirt::start().unwrap();
    let _swap = swap(ByteCount::mib(512));
    let mut guest = Guest::start_domain(&libvirt, working(42)).unwrap();
    let name = guest.domain().unwrap().to_owned();

    let (status, lines, words) = Manager::attach(&[&name, "--dry-run"]).end();
    assert!(status.success(), "{words}");
    let dossier = &lines[0];
    assert_eq!((&dossier["name"], &dossier["vmm"]), (&name.as_str().into(), &"qemu".into()), "{dossier}");
    assert_eq!(dossier["size"], 192 << 20);
    assert!(dossier["rungs"]["kernel-paging"].is_null(), "{dossier}");

    let (status, lines, words) = Manager::attach(&[&name, "--reclaim", "24M"]).end();
    assert!(status.success(), "{lines:?} {words}");
    let ended = lines.last().unwrap();
    assert_eq!((&ended["how"], &ended["wanted"]), (&"once".into(), &(24 << 20).into()), "{ended}");
    assert!(bytes(ended, "taken") >= 24 << 20, "{ended}");
    sweep(&mut guest);
}

#[test]
fn without_swap_nothing_is_taken_and_the_reason_is_said() {
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    if !plimsoll_linux::zram::host_swap().unwrap().is_empty() {
        println!("this host has swap of its own, so what is said without cannot be seen here");
        return;
    }
    let mut guest = Guest::start(Options::new(ByteCount::mib(192))).unwrap();
    let (status, lines, words) = Manager::attach(&[&process(&guest), "--dry-run"]).end();
    assert!(status.success(), "{words}");
    for rung in ["kernel-paging", "disk"] {
        assert!(lines[0]["rungs"][rung].as_str().unwrap().contains("plimsoll host prepare"), "{}", lines[0]);
    }
    assert!(lines[0]["rungs"]["resident-sharing"].is_null());
    let (status, lines, words) = Manager::attach(&[&process(&guest), "--reclaim", "16M"]).end();
    assert_eq!(status.code(), Some(1), "less than was asked for is no success: {words}");
    let ended = lines.last().unwrap();
    assert_eq!(ended["taken"], 0);
    assert!(ended["text"].as_str().unwrap().contains("no swap"), "{ended}");
    sweep(&mut guest);
}

#[test]
fn with_swap_full_no_more_is_taken_and_the_reason_is_said() {
    const SWAP: ByteCount = ByteCount::mib(16);
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    if !plimsoll_linux::zram::host_swap().unwrap().is_empty() {
        println!("this host has swap of its own, which would have to be filled");
        return;
    }
    let _swap = swap(SWAP);
    let mut guest = Guest::start(working(43)).unwrap();
    let (status, lines, words) = Manager::attach(&[&process(&guest), "--reclaim", "64M"]).end();
    assert_eq!(status.code(), Some(1), "{words}");
    let ended = lines.last().unwrap();
    assert!(ended["text"].as_str().unwrap().contains("swap is full"), "{ended}");
    // The guest works: what it brings back leaves room in swap, and is taken again.
    assert!((SWAP.0 / 2..2 * SWAP.0).contains(&bytes(ended, "taken")), "{ended}");
    sweep(&mut guest);
}

#[test]
fn a_machine_from_which_nothing_may_be_taken_is_counted_and_the_reason_is_said() {
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let mut options = Options::new(ByteCount::mib(192));
    options.arguments = vec!["-overcommit".to_owned(), "mem-lock=on".to_owned()];
    let mut guest = Guest::start(options).unwrap();
    let mut manager = Manager::attach(&[&process(&guest)]);
    let attached = manager.until("to be attached", |line| line["event"] == "attached");
    assert!(attached["counted_only"].as_str().unwrap().contains("locked"), "{attached}");
    for line in [manager.period(), manager.period()] {
        assert!(line["short"].as_str().unwrap().contains("locked"), "{line}");
        assert!(taken(&line) >= ByteCount::mib(190), "locked memory is all in RAM: {line}");
        assert_eq!((bytes(&line, "taken_pages"), bytes(&line, "sampled_pages")), (0, 0), "{line}");
        assert!(line["working_set_bytes"].is_null(), "{line}");
    }
    manager.interrupt();
    for words in [["--budget", "64M"], ["--budget", "auto"], ["--reclaim", "16M"]] {
        let (status, lines, said) = Manager::attach(&[&[&*process(&guest)], &words[..]].concat()).end();
        assert_eq!((status.code(), lines), (Some(2), Vec::new()));
        assert!(said.contains("nothing can be taken") && said.contains("locked"), "{said}");
    }
    sweep(&mut guest);
}

#[test]
fn a_manager_whose_words_nobody_reads_detaches() {
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let guest = Guest::start(Options::new(ByteCount::mib(192))).unwrap();
    let (status, _, words) = Manager::attach_unheard(&[&process(&guest)]).end();
    assert_eq!(status.code(), Some(1), "{words}");
    assert!(words.contains("nobody reads"), "{words}");
    // Its lock went with it.
    let mut next = Manager::attach(&[&process(&guest)]);
    next.period();
    next.interrupt();
}
