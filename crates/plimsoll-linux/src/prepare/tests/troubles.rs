//! Death and refusal at every call that changes something.
use super::fake::{Fake, Trouble, mortal};
use super::*;
use rustix::io::Errno;

/// Every option on a kernel that has them all, or zswap in front of a disk.
fn scenes() -> [(fn() -> Fake, Request); 2] {
    let all = ZramRequest {
        recompress: Some("zstd".to_owned()),
        write_back: Some("/dev/sdb1".into()),
        ..zram_request()
    };
    fn host() -> Fake {
        let fake = Fake::large();
        fake.set_file("/sys/class/block/sdb1/size", "1000\n");
        fake.add_area("/dev/sda2", -2);
        fake
    }
    [(host, Request::Zram(all)), (host, zswap())]
}

const DEATHS: [Trouble; 2] = [Trouble::DeathBefore, Trouble::DeathAfter];

#[test]
fn whatever_step_of_preparing_is_the_last_undo_brings_the_host_back() {
    for (host, request) in scenes() {
        for death in DEATHS {
            let mut deaths = 0;
            loop {
                let (fake, desk) = (host(), Desk::new());
                let before = fake.host();
                let plan = planned(&fake, &desk.place(), &request);
                fake.trouble(deaths, death);
                let end = mortal(|| apply(&fake, &desk.place(), &plan, &mut |_| {}));
                if !fake.no_trouble() {
                    end.unwrap().unwrap();
                    break;
                }
                assert!(end.is_none(), "it has survived its death");
                let error = super::plan(&fake, &desk.place(), &request).unwrap_err().to_string();
                assert!(error.contains("cut short while preparing"), "{error}");
                assert_eq!(undo_all(&fake, &desk.place()).unwrap(), Undone::All, "{death:?} at {deaths}");
                assert_eq!(fake.host(), before, "{death:?} at {deaths}");
                assert!(!desk.0.exists(), "{death:?} at {deaths}");
                deaths += 1;
            }
            assert!(deaths >= 3, "only {deaths} steps were tried");
        }
    }
}

#[test]
fn an_undo_that_died_is_taken_up_by_the_next() {
    for (host, request) in scenes() {
        for death in DEATHS {
            let mut deaths = 0;
            loop {
                let (fake, desk) = (host(), Desk::new());
                let before = fake.host();
                prepare(&fake, &desk.place(), &request).unwrap();
                fake.trouble(deaths, death);
                let end = mortal(|| undo_all(&fake, &desk.place()));
                if !fake.no_trouble() {
                    end.unwrap().unwrap();
                    break;
                }
                assert!(end.is_none(), "it has survived its death");
                assert_eq!(undo_all(&fake, &desk.place()).unwrap(), Undone::All, "{death:?} at {deaths}");
                assert_eq!(fake.host(), before, "{death:?} at {deaths}");
                assert!(!desk.0.exists());
                deaths += 1;
            }
            assert!(deaths >= 2, "only {deaths} steps were tried");
        }
    }
}

#[test]
fn a_refusal_at_any_step_takes_back_those_before_it() {
    let refusals = [
        Trouble::Refusal(Errno::BUSY),
        Trouble::Refusal(Errno::NOMEM),
        Trouble::Refusal(Errno::IO),
        Trouble::Short,
    ];
    for (host, request) in scenes() {
        for refusal in refusals {
            let mut steps = 0;
            loop {
                let (fake, desk) = (host(), Desk::new());
                let before = fake.host();
                let plan = planned(&fake, &desk.place(), &request);
                fake.trouble(steps, refusal);
                let end = apply(&fake, &desk.place(), &plan, &mut |_| {});
                if !fake.no_trouble() {
                    end.unwrap();
                    break;
                }
                let error = end.unwrap_err();
                assert!(!matches!(error, PrepareError::Stuck { .. }), "{error}");
                assert_eq!(fake.host(), before, "{refusal:?} at {steps}");
                assert!(!desk.0.exists(), "{refusal:?} at {steps}");
                steps += 1;
            }
            assert!(steps >= 3, "only {steps} steps were tried");
        }
    }
}

#[test]
fn memory_that_runs_out_while_swap_is_read_back_leaves_it_for_another_try() {
    let (fake, desk) = (Fake::small(), Desk::new());
    let before = fake.host();
    prepare(&fake, &desk.place(), &zram()).unwrap();
    fake.fill_area("/dev/zram1", ByteCount::mib(64));
    fake.trouble(0, Trouble::Refusal(Errno::NOMEM));
    let error = undo_all(&fake, &desk.place()).unwrap_err();
    assert!(matches!(error, PrepareError::OutOfMemory { used, .. } if used == ByteCount::mib(64)), "{error}");
    let error = plan(&fake, &desk.place(), &zram()).unwrap_err();
    assert!(matches!(error, PrepareError::CutShort { stage: Stage::Undoing }), "{error}");
    fake.no_trouble();
    assert_eq!(undo_all(&fake, &desk.place()).unwrap(), Undone::All);
    assert_eq!(fake.host(), before);
}

#[test]
fn of_several_empty_devices_none_is_taken_for_ours() {
    let (fake, desk) = (Fake::small(), Desk::new());
    let plan = planned(&fake, &desk.place(), &zram());
    fake.trouble(0, Trouble::DeathAfter);
    assert!(mortal(|| apply(&fake, &desk.place(), &plan, &mut |_| {})).is_none());
    assert!(fake.no_trouble());
    assert_eq!(fake.add_disk(), 2, "somebody else's");
    let both = fake.host();
    let Undo::Steps(steps) = outlook(&fake, &desk.place()).unwrap() else { panic!("no steps") };
    let [(_, Verdict::Left(found))] = steps.as_slice() else { panic!("{steps:?}") };
    assert!(found.contains("zram1, zram2"), "{found}");
    assert_eq!(undo_all(&fake, &desk.place()).unwrap(), Undone::SomeLeft);
    assert_eq!(fake.host(), both);
}

#[test]
fn an_empty_device_that_a_run_has_claimed_is_not_taken_for_ours() {
    let (fake, desk) = (Fake::small(), Desk::new());
    let plan = planned(&fake, &desk.place(), &zram());
    fake.trouble(0, Trouble::DeathBefore);
    assert!(mortal(|| apply(&fake, &desk.place(), &plan, &mut |_| {})).is_none());
    assert!(fake.no_trouble());
    assert_eq!(fake.add_disk(), 1);
    fake.set_file("/run/plimsoll/zram-1", "");
    let theirs = fake.host();
    assert_eq!(undo_all(&fake, &desk.place()).unwrap(), Undone::All);
    assert_eq!(fake.host(), theirs);
}

#[test]
fn a_kernel_that_shows_no_device_refuses_late_and_everything_is_taken_back() {
    let (fake, desk) = (Fake::small(), Desk::new());
    fake.remove_disk(0);
    let before = fake.host();
    let wrong = [
        (
            ZramRequest { algorithm: Some("gzip".to_owned()), ..zram_request() },
            "it offers \"[lzo-rle] lzo lz4\"",
        ),
        (ZramRequest { recompress: Some("zstd".to_owned()), ..zram_request() }, "CONFIG_ZRAM_MULTI_COMP"),
    ];
    for (request, sentence) in wrong {
        let error = prepare(&fake, &desk.place(), &Request::Zram(request)).unwrap_err().to_string();
        assert!(error.contains(sentence), "{error}");
        assert_eq!(fake.host(), before);
        assert!(!desk.0.exists());
    }
}

#[test]
fn a_record_that_cannot_be_written_any_more_takes_everything_back() {
    let (fake, desk) = (Fake::small(), Desk::new());
    let before = fake.host();
    let plan = planned(&fake, &desk.place(), &zram());
    let mut changes = 0;
    let error = apply(&fake, &desk.place(), &plan, &mut |_| {
        changes += 1;
        if changes == 4 {
            fs::create_dir(desk.0.join("host.json.new")).unwrap();
        }
    })
    .unwrap_err();
    assert!(matches!(error, PrepareError::Unrecordable { .. }), "{error}");
    assert_eq!((fake.host(), changes), (before, 4));
    assert!(!desk.place().path().exists());
}

#[test]
fn without_a_record_nothing_is_changed() {
    let (fake, desk) = (Fake::small(), Desk::new());
    let before = fake.host();
    // No file can be written where a directory stands, whoever asks.
    fs::create_dir_all(desk.0.join("host.json.new")).unwrap();
    let error = prepare(&fake, &desk.place(), &zram()).unwrap_err();
    assert!(matches!(error, PrepareError::Unrecordable { .. }), "{error}");
    assert_eq!(fake.host(), before);
    assert!(!desk.place().path().exists());
}
