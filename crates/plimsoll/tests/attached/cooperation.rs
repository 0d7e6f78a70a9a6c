//! Guests that give and take memory when they are asked, by the unmodified drivers of a stock kernel.
use crate::liar::{Liar, Lie};
use crate::manager::{Manager, PATIENCE, STOCK, alone, ask, backed, bytes, can, swap, sweep, taken};
use plimsoll_linux::cgroup::MemoryCgroup;
use plimsoll_stock::{Command, Guest, Libvirt, Options};
use plimsoll_sys::ProcessId;
use plimsoll_sys::procfs::smaps_rollup;
use plimsoll_types::ByteCount;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Between two looks at a condition that is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(100);

fn present(guest: &Guest) -> ByteCount {
    backed(guest).0
}

/// What QEMU has of private memory: guest RAM, and what its translator needs.
fn private(guest: &Guest) -> ByteCount {
    smaps_rollup(guest.process()).unwrap().anonymous
}

/// What it says with these words, which it must end well with.
fn guest_verb(guest: &Guest, words: &[&str]) -> Vec<Value> {
    ends_well(|| outcome(guest, words))
}

/// What is said when it ends well. A guest that does not move for some seconds, as on a busy machine, is given up, and asked once more.
fn ends_well(mut attempt: impl FnMut() -> (Option<i32>, Vec<Value>, String)) -> Vec<Value> {
    const TRIES: u32 = 4;
    for _ in 1..TRIES {
        let (code, lines, said) = attempt();
        match code {
            Some(0) => return lines,
            _ => println!("once more: {lines:?} {said}"),
        }
    }
    let (code, lines, said) = attempt();
    assert_eq!(code, Some(0), "{lines:?} {said}");
    lines
}

/// How `plimsoll guest` ends with the guest's QMP socket and these words.
fn outcome(guest: &Guest, words: &[&str]) -> (Option<i32>, Vec<Value>, String) {
    let (process, qmp) = (guest.process().get().to_string(), guest.qmp());
    let mut all = vec![process.as_str(), "--qmp", qmp.to_str().unwrap()];
    all.extend(words);
    let (status, lines, said) = Manager::run("guest", &all).end();
    (status.code(), lines, said)
}

/// Waits until a size is as wanted, and says how long that took.
fn wait_until(
    what: &str,
    within: Duration,
    mut size: impl FnMut() -> ByteCount,
    is_wanted: impl Fn(ByteCount) -> bool,
) -> Duration {
    let start = Instant::now();
    loop {
        let now = size();
        if is_wanted(now) {
            return start.elapsed();
        }
        assert!(start.elapsed() < within, "waited in vain for {what}: {now}");
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Has the guest touch nearly all of its 512 MiB, and then work on a part.
fn fill(guest: &mut Guest) {
    ask(guest, Command::Alloc { pages: 95_000 });
    ask(guest, Command::Free);
    ask(guest, Command::Alloc { pages: 8000 });
    ask(guest, Command::Hot { pages: 1000, per_second: 200 });
}

/// What it says last, which must be that all is as wished.
fn there(lines: &[Value]) -> &Value {
    let ended = lines.last().unwrap();
    assert_eq!((&ended["event"], &ended["how"]), (&"ended".into(), &"there".into()), "{ended}");
    ended
}

/// The one line of a description.
pub(crate) fn described(guest: &Guest, words: &[&str]) -> Value {
    let lines = guest_verb(guest, words);
    let [description] = lines.as_slice() else { panic!("{lines:?}") };
    description.clone()
}

#[test]
fn what_a_balloon_takes_from_one_guest_another_in_the_same_cgroup_can_have() {
    const SIZE: ByteCount = ByteCount::mib(512);
    /// One percent of both guests.
    const TOLERANCE: u64 = 2 * SIZE.0 / 100;
    /// What is left of the cgroup when the first guest is full: far less than the second one will take.
    const SPARE: ByteCount = ByteCount::mib(32);
    if !can(&STOCK) || !can(&["cgroup"]) {
        return;
    }
    let _alone = alone();
    let cgroup = MemoryCgroup::create("plimsoll-cooperation", ProcessId::own()).unwrap();
    // They are inside from their first page: what is charged elsewhere would be missed here when it is given back.
    cgroup.join_self().unwrap();
    let [mut first, mut second] =
        [61, 62].map(|seed| Guest::start(Options { seed, ..Options::new(SIZE) }).unwrap());
    cgroup.leave_self().unwrap();
    fill(&mut first);
    let (charged, full) = (cgroup.used().unwrap(), private(&first));
    let small = private(&second);
    cgroup.set_limit(charged + SPARE).unwrap();

    let lines = guest_verb(&first, &["--balloon", "192M"]);
    there(&lines);
    let given = full.saturating_sub(private(&first));
    assert!(given >= ByteCount::mib(200), "only {given} came back to the host");
    // What is in the balloon is in nobody's memory.
    let most = ByteCount(ByteCount::mib(192).0 + SIZE.0 / 100);
    assert!(present(&first) <= most, "{} of a guest that has 192M", present(&first));
    sweep(&mut first);

    ask(&mut second, Command::Alloc { pages: given.pages_floor().0.min(75_000) });
    let gained = private(&second).saturating_sub(small);
    assert!(gained.0 > SPARE.0 * 4, "{gained} would have fitted without what the first gave");
    let now = cgroup.used().unwrap();
    let lost = full.saturating_sub(private(&first));
    let unaccounted = (now.0 + lost.0).abs_diff(charged.0 + gained.0);
    println!(
        "one guest gave {lost} in {} s, the other took {gained}; {charged} were charged before and {now} are now: {} unaccounted for",
        lines[lines.len() - 2]["seconds"],
        ByteCount(unaccounted)
    );
    assert!(unaccounted <= TOLERANCE, "{} came from or went to nobody", ByteCount(unaccounted));
    assert_eq!(cgroup.oom_kills().unwrap(), 0);
    sweep(&mut second);

    // And back: what the first guest uses again is there again.
    cgroup.set_limit(ByteCount(SIZE.0 * 4)).unwrap();
    there(&guest_verb(&first, &["--balloon", "512M"]));
    let without = present(&first);
    ask(&mut first, Command::Alloc { pages: 60_000 });
    let rise = present(&first).saturating_sub(without);
    assert!(rise >= ByteCount::mib(200), "{rise}");
    sweep(&mut first);
}

#[test]
fn memory_is_plugged_into_a_guest_at_work_and_taken_out_again() {
    const PLUGGED: ByteCount = ByteCount::mib(256);
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let mut options = Options::new(ByteCount::mib(256));
    options.seed = 64;
    options.work = vec![Command::Alloc { pages: 8000 }, Command::Hot { pages: 1000, per_second: 200 }];
    let words = ["-m", "slots=2,maxmem=2G", "-object", "memory-backend-ram,id=pool,size=512M"];
    options.arguments = words.map(str::to_owned).to_vec();
    options.devices.push("virtio-mem-pci,id=vm0,memdev=pool,requested-size=0".to_owned());
    let mut guest = Guest::start(options).unwrap();
    let available = |guest: &mut Guest| guest.console().report(PATIENCE).unwrap().available;
    let before = available(&mut guest);

    // A size that is no multiple of its blocks is rounded down, and that is said.
    let lines = guest_verb(&guest, &["--plug", "257M"]);
    assert_eq!(
        (&lines[0]["event"], there(&lines)["how"].as_str()),
        (&"note".into(), Some("there")),
        "{lines:?}"
    );
    let description = described(&guest, &[]);
    let device = &description["virtio_mem"]["pieces"][0];
    assert_eq!(device["id"], "vm0");
    assert_eq!((bytes(device, "plugged_bytes"), bytes(device, "requested_bytes")), (PLUGGED.0, PLUGGED.0));
    // The guest's kernel keeps some of it for itself: descriptions of pages, and a reserve for another zone.
    let most = ByteCount(PLUGGED.0 / 4 * 3);
    let what = format!("the guest to see the memory beside {before}");
    wait_until(&what, PATIENCE, || available(&mut guest), |now| now >= before + most);
    // More than it had room for before.
    ask(&mut guest, Command::Alloc { pages: 60_000 });
    sweep(&mut guest);
    ask(&mut guest, Command::Free);
    ask(&mut guest, Command::Alloc { pages: 8000 });

    there(&guest_verb(&guest, &["--plug", "vm0=0"]));
    let description = described(&guest, &[]);
    assert_eq!(bytes(&description["virtio_mem"]["pieces"][0], "plugged_bytes"), 0, "{description}");
    sweep(&mut guest);
    let small = available(&mut guest);
    assert!(small < before + ByteCount::mib(32), "{small} are available, {before} were at first");

    // A memory module, for good.
    there(&guest_verb(&guest, &["--plug", "memory modules=128M"]));
    let what = format!("the guest to see the module beside {small}");
    wait_until(&what, PATIENCE, || available(&mut guest), |now| now >= small + ByteCount::mib(100));
    sweep(&mut guest);
    let report = guest.console().report(PATIENCE).unwrap();
    assert!(report.operations > 0 && report.wrong == 0, "{report:?}");
}

#[test]
fn a_domain_of_libvirts_shows_its_balloon_and_moves_it() {
    if !can(&["qemu", "libvirt", "cloud-kernel", "root"]) {
        return;
    }
    let _alone = alone();
    let libvirt = Libvirt::start().unwrap();
    let mut options = Options::new(ByteCount::mib(256));
    options.seed = 65;
    options.work = vec![Command::Alloc { pages: 4000 }];
    let mut guest = Guest::start_domain(&libvirt, options).unwrap();
    let name = guest.domain().unwrap().to_owned();
    let run = |words: &[&str]| {
        ends_well(|| {
            let (status, lines, said) = Manager::run("guest", &[&[name.as_str()], words].concat()).end();
            (status.code(), lines, said)
        })
    };
    // A guest that was not scheduled for some seconds has told nothing yet, and libvirt has no answer for so long.
    let described = |words: &[&str], is_told: fn(&Value) -> bool| {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let described = run(words).swap_remove(0);
            if is_told(&described) || Instant::now() >= deadline {
                return described;
            }
        }
    };
    let before = described(&["--statistics", "1"], |told| told["statistics"]["available_bytes"].is_u64());
    assert_eq!((&before["name"], bytes(&before["balloon"], "actual_bytes")), (&name.as_str().into(), 0));
    assert!(bytes(&before["statistics"], "available_bytes") > 50 << 20, "{before}");
    assert!(before["virtio_mem"]["why_not"].is_string(), "{before}");
    there(&run(&["--balloon", "192M"]));
    let after = described(&[], |told| told["balloon"]["actual_bytes"].is_u64());
    let actual = ByteCount(bytes(&after["balloon"], "actual_bytes"));
    assert!(ByteCount::mib(64).0.abs_diff(actual.0) <= ByteCount::mib(256).0 / 100, "{after}");
    sweep(&mut guest);
}

#[test]
fn a_vmm_that_lies_about_its_balloon_gains_nothing() {
    const SIZE: ByteCount = ByteCount::mib(256);
    const WANTED: ByteCount = ByteCount::mib(192);
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let mut options = Options::new(SIZE);
    options.seed = 66;
    options.work = vec![Command::Alloc { pages: 8000 }, Command::Hot { pages: 1000, per_second: 200 }];
    let mut guest = Guest::start(options).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut lied_to = |lie: Lie| {
        let socket = folder.path().join(format!("{lie:?}"));
        let liar = Liar::start(&socket, &guest.qmp(), SIZE.0, lie);
        let (process, socket) = (guest.process().get().to_string(), socket.to_str().unwrap());
        let words = [&process, "--qmp", socket, "--balloon", "192M"];
        let (status, lines, said) = Manager::run("guest", &words).end();
        let asked = liar.asked();
        // Whatever was said, the guest was to keep what it was to have, and goes on with it.
        assert!(asked.iter().all(|left| *left >= WANTED.0), "{lie:?}: {asked:?}");
        sweep(&mut guest);
        let notes = lines.iter().filter(|line| line["event"] == "note").count();
        assert_eq!(notes, 0, "{lie:?}: what went wrong is the last word, and no other: {lines:?}");
        let answer = guest.monitor().unwrap().call("query-balloon", &json!({})).unwrap();
        (
            status.code(),
            lines.last().map_or(said, |line| line["text"].to_string()),
            asked,
            bytes(&answer, "actual"),
        )
    };

    let (code, text, asked, _) = lied_to(Lie::Absurd);
    assert!(
        code == Some(2) && text.contains("possible sizes") && asked.is_empty(),
        "{code:?} {text} {asked:?}"
    );

    // The real guest followed what was asked before it was given up: it gets all of it back.
    let (code, text, asked, _) = lied_to(Lie::Still);
    assert!(code == Some(1) && text.contains("does not move its balloon"), "{code:?} {text}");
    assert!(asked.len() >= 2 && asked.last() == Some(&SIZE.0), "{asked:?}");

    let (code, text, asked, _) = lied_to(Lie::Refusing);
    assert!(code == Some(2) && text.contains("not today") && asked.is_empty(), "{code:?} {text} {asked:?}");
    for (lie, reason) in
        [(Lie::HangingUpAt("balloon"), "closed the connection"), (Lie::Ahead, "something else than QMP")]
    {
        let (code, text, ..) = lied_to(lie);
        assert!(code == Some(1) && text.contains(reason), "{lie:?}: {code:?} {text}");
    }

    let (code, text, asked, left) = lied_to(Lie::Eager);
    assert_eq!(code, Some(0), "{text}");
    assert!(asked.len() >= 3 && left >= WANTED.0, "{asked:?} {left}");
}

#[test]
fn what_cannot_be_is_refused_in_a_sentence_before_the_guest_is_asked() {
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let mut guest = Guest::start(Options::new(ByteCount::mib(192))).unwrap();
    for (words, reason) in [
        (&["--balloon", "1G"][..], "without one it has 192M"),
        (&["--balloon", "1M"], "leave it 16M at least"),
        (&["--plug", "64M"], "no memory can be plugged into this machine"),
        (&["--api", "/nowhere"], "QEMU does not speak HTTP: leave --api out"),
    ] {
        let (code, lines, said) = outcome(&guest, words);
        assert_eq!((code, lines), (Some(2), Vec::new()), "{words:?}");
        assert!(said.contains(reason) && said.lines().count() == 1, "{words:?}: {said}");
    }
    // Without a socket it is not guessed that the machine's own is free.
    let (status, _, said) = Manager::run("guest", &[&guest.process().get().to_string()]).end();
    assert!(status.code() == Some(2) && said.contains("give it with --qmp"), "{said}");
    guest.monitor().unwrap().call("stop", &json!({})).unwrap();
    let (code, _, said) = outcome(&guest, &["--balloon", "128M"]);
    assert!(code == Some(2) && said.contains("resume it first"), "{said}");
}

/// Free page reporting at its smallest: a guest of 6.1 reports whole free blocks of 2 MiB and 4 MiB, two seconds after the last
/// one it heard of, and QEMU drops each.
#[test]
fn a_guest_that_reports_its_free_pages_gives_them_back_without_being_asked_and_their_swap_too() {
    const USED: ByteCount = ByteCount::mib(300);
    /// What it may keep of it: blocks of which somebody else has a page.
    const KEPT: ByteCount = ByteCount::mib(40);
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let _swap = swap(ByteCount::mib(512));
    let mut options = Options::new(ByteCount::mib(512));
    options.seed = 63;
    options.devices = vec!["virtio-balloon-pci,id=balloon0,free-page-reporting=on".to_owned()];
    let mut guest = Guest::start(options).unwrap();
    let reporting = &described(&guest, &[])["free_page_reporting"];
    assert!(reporting["why_not"].is_null(), "{reporting}");
    let small = present(&guest);
    for is_paged_out in [false, true] {
        ask(&mut guest, Command::Alloc { pages: USED.pages_floor().0 });
        let full = present(&guest);
        assert!(full >= small + ByteCount::mib(200), "{full} of {small}");
        if is_paged_out {
            let pid = guest.process().get().to_string();
            let (status, lines, said) = Manager::run("attach", &[&pid, "--reclaim", "200M"]).end();
            assert!(status.success(), "{lines:?} {said}");
        }
        let (_, swapped) = backed(&guest);
        assert_eq!(swapped >= ByteCount::mib(150), is_paged_out, "{swapped}");
        ask(&mut guest, Command::Free);
        // What of it is in swap must go, too: with 150 MiB left there, there would be too much in all.
        let took = wait_until(
            &format!("{USED} of {full} to be given back"),
            PATIENCE,
            || {
                let (present, swapped) = backed(&guest);
                present + swapped
            },
            |left| left <= full.saturating_sub(USED) + KEPT,
        );
        let (left, swapped_left) = backed(&guest);
        println!(
            "{full}, {swapped} of them in swap, became {left}, {swapped_left} in swap, in {} ms after the guest had freed {USED}",
            took.as_millis()
        );
    }
    ask(&mut guest, Command::Alloc { pages: 20_000 });
    sweep(&mut guest);
}

#[test]
fn what_is_in_a_balloon_is_not_in_swap() {
    const LEFT: ByteCount = ByteCount::mib(128);
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let _swap = swap(ByteCount::mib(512));
    let mut options = Options::new(ByteCount::mib(320));
    options.seed = 67;
    let mut guest = Guest::start(options).unwrap();
    ask(&mut guest, Command::Alloc { pages: 50_000 });
    ask(&mut guest, Command::Free);
    ask(&mut guest, Command::Alloc { pages: 6000 });
    let pid = guest.process().get().to_string();
    let (status, lines, said) = Manager::run("attach", &[&pid, "--reclaim", "180M"]).end();
    assert!(status.success(), "{lines:?} {said}");
    let (_, before) = backed(&guest);
    // Not by our controller, which does not inflate into a machine whose pages come back: this guest's kernel zeroes what it
    // allocates, for its balloon too.
    guest.monitor().unwrap().call("balloon", &json!({ "value": LEFT.0 })).unwrap();
    let mut has = || {
        let answer = guest.monitor().unwrap().call("query-balloon", &json!({})).unwrap();
        ByteCount(bytes(&answer, "actual"))
    };
    wait_until("the balloon to be full", PATIENCE, &mut has, |has| has == LEFT);
    let (present, swapped) = backed(&guest);
    println!("{before} in swap before and {swapped} after; {present} in RAM");
    assert!(before >= ByteCount::mib(150), "{before}");
    // In swap can be only what the guest still has.
    assert!(present + swapped <= LEFT + ByteCount::mib(4), "{present} and {swapped} of {LEFT}");
    sweep(&mut guest);
}

/// How often QEMU asks the guest for statistics, in seconds.
fn statistics_interval(guest: &mut Guest) -> Value {
    let property =
        json!({ "path": "/machine/peripheral/balloon0", "property": "guest-stats-polling-interval" });
    guest.monitor().unwrap().call("qom-get", &property).unwrap()
}

#[test]
fn a_balloon_on_its_way_ends_with_a_signal_or_with_its_machine_and_statistics_are_told_as_before() {
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let mut options = Options::new(ByteCount::mib(256));
    options.seed = 68;
    options.work = vec![Command::Alloc { pages: 8000 }];
    let mut guest = Guest::start(options).unwrap();
    let every = json!({ "path": "/machine/peripheral/balloon0", "property": "guest-stats-polling-interval", "value": 7 });
    guest.monitor().unwrap().call("qom-set", &every).unwrap();
    let (pid, qmp) = (guest.process().get().to_string(), guest.qmp());
    let words = [pid.as_str(), "--qmp", qmp.to_str().unwrap(), "--balloon", "128M"];
    let begin = || {
        let mut manager = Manager::run("guest", &words);
        manager.until("the balloon to be asked for", |line| {
            line["event"] == "balloon" && bytes(line, "asked_bytes") > 0
        });
        manager
    };
    let manager = begin();
    assert_eq!(statistics_interval(&mut guest), 1);
    manager.signal();
    let (status, lines, said) = manager.end();
    let last = lines.last().unwrap();
    assert!(status.code() == Some(1) && last["text"].as_str().unwrap().contains("a signal"), "{last} {said}");
    assert_eq!(statistics_interval(&mut guest), 7);
    sweep(&mut guest);

    // A wish for statistics is one, too.
    there(&guest_verb(&guest, &["--balloon", "220M", "--statistics", "3"]));
    assert_eq!(statistics_interval(&mut guest), 3);

    let manager = begin();
    drop(guest);
    let (status, lines, said) = manager.end();
    assert_eq!(status.code(), Some(1), "{lines:?} {said}");
    let ended: Vec<&Value> = lines.iter().filter(|line| line["event"] != "balloon").collect();
    let [last] = ended[..] else { panic!("{ended:?}") };
    assert!(last["text"].as_str().unwrap().contains("the machine has ended"), "{last} {said}");
}

#[test]
fn an_interface_that_fails_is_told_of_once_and_its_machine_is_managed_without() {
    const BUDGET: ByteCount = ByteCount::mib(160);
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let _swap = swap(ByteCount::mib(512));
    let mut options = Options::new(ByteCount::mib(256));
    options.seed = 69;
    options.work = vec![Command::Alloc { pages: 38_000 }, Command::Hot { pages: 500, per_second: 100 }];
    let mut guest = Guest::start(options).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("qmp");
    let liar = Liar::start(&socket, &guest.qmp(), ByteCount::mib(256).0, Lie::Nothing);
    let pid = guest.process().get().to_string();
    let mut manager = Manager::attach(&[&pid, "--budget", "160M", "--qmp", socket.to_str().unwrap()]);
    manager.until("to be attached", |line| line["event"] == "attached");
    liar.turn_to(Lie::HangingUpAt("query-migrate"));
    let is_note = |line: &Value| line["event"] == "note";
    let told = manager.until("a word about the socket", is_note);
    assert!(told["text"].as_str().unwrap().contains(socket.to_str().unwrap()), "{told}");
    let mut periods = 0;
    let last = manager.until("the machine to be within its budget, told of nothing more", |line| {
        assert!(!is_note(line), "{line}");
        periods += u32::from(line["event"] == "period");
        periods >= 5 && line["event"] == "period" && taken(line) <= BUDGET + ByteCount::mib(8)
    });
    assert!(bytes(&last, "taken_pages") > 1000, "{last}");
    manager.interrupt();
    sweep(&mut guest);
}
