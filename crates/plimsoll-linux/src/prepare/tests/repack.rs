//! Rounds of recompression over a made-up kernel and a made-up time.
use super::super::repack::{Next, PASSES, PAUSE, PAUSE_PER_WORK, REST, Repacker, VAIN_MAX};
use super::*;
use plimsoll_sys::swap::{SwapPriority, SwapRank};
use rustix::io::Errno;
use std::cell::Cell;
use std::time::Instant;

const MARK: &str = "idle=all";
const PASS: &str = "recompress=type=idle max_pages=1024";
/// A device with so much in it that two passes make something smaller.
const TWO_PASSES: &str = "8388608 1048577 3145728 0 3145728 0 0 0 0";

fn request(recompress: bool) -> Request {
    Request::Zram(ZramRequest { recompress: recompress.then(|| "zstd".to_owned()), ..zram_request() })
}

/// A host of one's own, on which zram1 is prepared and zram0 is somebody else's.
struct Bench {
    fake: Fake,
    desk: Desk,
    now: Cell<Instant>,
    /// What each look at the clock takes.
    work: Cell<Duration>,
}

impl Bench {
    fn bare() -> Self {
        Self { fake: Fake::large(), desk: Desk::new(), now: Cell::new(Instant::now()), work: Cell::default() }
    }

    fn prepared(recompress: bool) -> Self {
        let bench = Self::bare();
        prepare(&bench.fake, &bench.desk.place(), &request(recompress)).unwrap();
        bench
    }

    fn repacker(&self) -> Repacker<'_> {
        Repacker::new(&self.fake, self.desk.place())
    }

    /// A turn at the time the last one said; what was said to zram1, and after how long comes the next.
    fn turn(&self, repacker: &mut Repacker<'_>) -> (Vec<String>, Duration) {
        let now = self.now.get();
        match repacker.turn(&|| self.now.replace(self.now.get() + self.work.get())) {
            Next::At(next) => {
                self.now.set(next);
                (self.said(), next - now)
            }
            Next::Ended(why) => panic!("ended: {why}"),
        }
    }

    fn end(&self, repacker: &mut Repacker<'_>) -> String {
        match repacker.turn(&|| self.now.get()) {
            Next::At(_) => panic!("goes on, having said {:?}", self.said()),
            Next::Ended(why) => why,
        }
    }

    /// The commands since the last time.
    fn said(&self) -> Vec<String> {
        let commands = ["idle", "recompress"].into_iter();
        let said = commands.filter_map(|name| {
            let text = self.fake.attribute(1, name);
            self.fake.set_attribute(1, name, "");
            (!text.is_empty()).then(|| format!("{name}={text}"))
        });
        said.collect()
    }
}

fn one(command: &str, rest: Duration) -> (Vec<String>, Duration) {
    (vec![command.to_owned()], rest)
}

fn nothing(rest: Duration) -> (Vec<String>, Duration) {
    (Vec::new(), rest)
}

#[test]
fn what_is_idle_still_after_a_rest_is_recompressed_in_passes_until_some_gain_nothing() {
    let bench = Bench::prepared(true);
    bench.fake.set_attribute(1, "mm_stat", TWO_PASSES);
    let others = bench.fake.attribute(0, "idle");
    let mut repacker = bench.repacker();
    for round in 0..3 {
        assert_eq!(bench.turn(&mut repacker), one(MARK, REST), "round {round}");
        if round == 0 {
            assert_eq!(bench.turn(&mut repacker), one(PASS, PAUSE));
            assert_eq!(bench.turn(&mut repacker), one(PASS, PAUSE));
        }
        for pass in 0..VAIN_MAX {
            assert_eq!(bench.turn(&mut repacker), one(PASS, PAUSE), "pass {pass} in vain of round {round}");
        }
    }
    assert_eq!(bench.fake.attribute(0, "idle"), others, "somebody else's device is left alone");
    assert_eq!(bench.fake.attribute(0, "recompress"), "");
}

#[test]
fn passes_end_after_a_minute_however_much_is_left() {
    let bench = Bench::prepared(true);
    bench.fake.set_attribute(1, "mm_stat", "0 1099511627776 0 0 0 0 0 0 0");
    let mut repacker = bench.repacker();
    bench.turn(&mut repacker);
    let began = bench.now.get();
    while bench.turn(&mut repacker).0 == [PASS] {
        assert!(bench.now.get() - began <= PASSES + 2 * PAUSE);
    }
    assert!(bench.now.get() - began >= PASSES);
}

#[test]
fn a_long_call_is_followed_by_a_rest_that_leaves_it_a_twentieth_of_a_processor() {
    let bench = Bench::prepared(true);
    let mut repacker = bench.repacker();
    bench.turn(&mut repacker);
    bench.work.set(Duration::from_secs(3));
    assert_eq!(bench.turn(&mut repacker).1, Duration::from_secs(3) * (PAUSE_PER_WORK + 1));
}

/// Turns over half an hour say nothing to any device.
fn assert_silent(bench: &Bench, repacker: &mut Repacker<'_>) {
    let before = bench.fake.host();
    let end = bench.now.get() + Duration::from_secs(1800);
    while bench.now.get() < end {
        match repacker.turn(&|| bench.now.get()) {
            Next::At(next) => bench.now.set(next),
            Next::Ended(why) => panic!("ended: {why}"),
        }
    }
    assert_eq!(bench.fake.host(), before);
}

#[test]
fn nothing_is_said_to_a_device_that_is_not_on_record() {
    let bench = Bench::bare();
    // Swap that somebody else has set up on a kernel that could recompress it.
    let disk = crate::zram::Disk::new(&bench.fake, 0);
    disk.set("recomp_algorithm", "algo=zstd priority=1").unwrap();
    disk.set("disksize", "1073741824").unwrap();
    disk.format(&crate::zram::swap_header(ByteCount::mib(1024)).unwrap()).unwrap();
    disk.swapon(SwapPriority::Fixed(SwapRank::new(100).unwrap())).unwrap();
    assert_silent(&bench, &mut bench.repacker());
}

#[test]
fn nothing_is_said_where_it_was_not_asked_for() {
    let bench = Bench::prepared(false);
    assert_silent(&bench, &mut bench.repacker());
}

#[test]
fn nothing_more_is_said_once_the_device_is_not_as_it_was_set_up() {
    type Change = (&'static str, fn(&Bench));
    let changes: [Change; 6] = [
        ("undone", |bench| assert_eq!(undo_all(&bench.fake, &bench.desk.place()).unwrap(), Undone::All)),
        ("rebooted", |bench| bench.fake.reboot()),
        ("removed", |bench| {
            bench.fake.remove_area("/dev/zram1");
            bench.fake.remove_disk(1);
        }),
        ("another device of the number", |bench| {
            bench.fake.remove_disk(1);
            assert_eq!(bench.fake.add_disk(), 1);
        }),
        ("swap no more", |bench| bench.fake.remove_area("/dev/zram1")),
        ("somebody else's swap", |bench| bench.fake.set_priority("/dev/zram1", 5)),
    ];
    for (what, change) in changes {
        println!("{what}");
        let bench = Bench::prepared(true);
        let mut repacker = bench.repacker();
        assert_eq!(bench.turn(&mut repacker), one(MARK, REST));
        change(&bench);
        assert_silent(&bench, &mut repacker);
    }
}

#[test]
fn a_device_that_goes_while_it_is_spoken_to_is_no_refusal() {
    let bench = Bench::prepared(true);
    let mut repacker = bench.repacker();
    bench.turn(&mut repacker);
    // Looked at before the command, it is there; after it, it is not.
    bench.fake.trouble(0, fake::Trouble::Removal(1));
    assert_eq!(repacker.turn(&|| bench.now.get()), Next::At(bench.now.get() + REST));
}

#[test]
fn a_host_that_is_prepared_later_or_anew_begins_with_marks() {
    let bench = Bench::bare();
    let (mut repacker, place) = (bench.repacker(), bench.desk.place());
    assert_eq!(repacker.turn(&|| bench.now.get()), Next::At(bench.now.get() + REST));
    for _ in 0..2 {
        prepare(&bench.fake, &place, &request(true)).unwrap();
        assert_eq!(bench.turn(&mut repacker), one(MARK, REST));
        undo_all(&bench.fake, &place).unwrap();
    }
}

#[test]
fn one_of_several_does_it_and_another_goes_on_when_it_ends() {
    let bench = Bench::prepared(true);
    let (mut first, mut second) = (bench.repacker(), bench.repacker());
    assert_eq!(bench.turn(&mut first), one(MARK, REST));
    assert_eq!(bench.turn(&mut second), nothing(REST));
    assert_eq!(bench.turn(&mut first), one(PASS, PAUSE));
    drop(first);
    assert_eq!(bench.turn(&mut second), one(MARK, REST));
}

#[test]
fn a_refusal_is_told_and_ends_it_and_a_full_or_busy_host_is_none() {
    for errno in [Errno::AGAIN, Errno::BUSY, Errno::NOMEM, Errno::INTR] {
        let bench = Bench::prepared(true);
        let mut repacker = bench.repacker();
        bench.turn(&mut repacker);
        bench.fake.trouble(0, fake::Trouble::Refusal(errno));
        assert_eq!(bench.turn(&mut repacker), nothing(REST), "{errno}");
        bench.fake.no_trouble();
        assert_eq!(bench.turn(&mut repacker), one(MARK, REST));
    }
    let bench = Bench::prepared(true);
    let mut repacker = bench.repacker();
    bench.fake.trouble(0, fake::Trouble::Refusal(Errno::INVAL));
    let why = bench.end(&mut repacker);
    assert!(why.contains("/sys/block/zram1/idle"), "{why}");
}

#[test]
fn a_kernel_that_knows_no_limit_is_not_asked() {
    for (release, is_asked) in [("6.9.12-test", false), ("6.10.0", true), ("7.0", true), ("strange", false)] {
        let bench = Bench::prepared(true);
        bench.fake.set_file("/proc/sys/kernel/osrelease", release);
        let mut repacker = bench.repacker();
        if is_asked {
            assert_eq!(bench.turn(&mut repacker), one(MARK, REST));
        } else {
            let why = bench.end(&mut repacker);
            assert!(why.contains(release) && why.contains("6.10"), "{why}");
            assert_eq!(bench.said(), [""; 0]);
        }
    }
}

#[test]
fn the_thread_tells_why_it_has_ended_and_ends_at_once_when_dropped() {
    let desk = Desk::new();
    fs::create_dir(&desk.0).unwrap();
    fs::set_permissions(&desk.0, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(desk.place().path(), "{").unwrap();
    let repacking = Repacking::start(desk.place()).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    let why = loop {
        if let Some(why) = repacking.heard() {
            break why;
        }
        assert!(Instant::now() < deadline, "nothing is told");
        std::thread::yield_now();
    };
    assert!(why.contains("is damaged"), "{why}");
    assert_eq!(repacking.heard(), None, "told once");
    drop(repacking);

    fs::remove_file(desk.place().path()).unwrap();
    let began = Instant::now();
    drop(Repacking::start(desk.place()).unwrap());
    assert!(began.elapsed() < REST, "it rests on");
}
