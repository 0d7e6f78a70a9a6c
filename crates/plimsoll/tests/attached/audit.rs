//! `plimsoll audit` of stock guests: apart, and after KSM has merged what they have alike.
use crate::manager::{Manager, alone, bytes, can, sweep};
use crate::share::share;
use plimsoll_stock::{Command, Guest, Options};
use plimsoll_types::ByteCount;
use serde_json::Value;

fn audit(words: &[&str]) -> (Option<i32>, Value) {
    let (status, lines, said) = Manager::run("audit", words).end();
    assert_eq!(lines.len(), 1, "{said}");
    (status.code(), lines.into_iter().next().unwrap())
}

#[test]
fn frames_of_guests_are_disjoint_until_they_are_merged_which_only_a_domain_may() {
    /// As long as it takes to merge some of 39 MiB.
    const SECONDS: &str = "12";
    if !can(&["qemu", "cloud-kernel", "root", "ksm"]) {
        return;
    }
    let _alone = alone();
    let mut options = Options::new(ByteCount::mib(192));
    options.seed = 62;
    options.work = vec![Command::Alloc { pages: 10_000 }];
    let mut guests = [Guest::start(options.clone()).unwrap(), Guest::start(options).unwrap()];
    let [one, other] = guests.each_ref().map(|guest| guest.process().get().to_string());
    let domain = format!("{one},{other}");

    let (code, apart) = audit(&[&one, &other]);
    assert_eq!(
        (code, &apart["violations"], &apart["merged_pages"]),
        (Some(0), &Value::Array(Vec::new()), &0.into())
    );
    for machine in apart["machines"].as_array().unwrap() {
        assert_eq!(machine["size"], 192 << 20, "{machine}");
        let states = ["present_bytes", "zero_bytes", "swapped_bytes", "absent_bytes"];
        assert_eq!(states.iter().map(|state| bytes(machine, state)).sum::<u64>(), 192 << 20, "{machine}");
    }

    let output = share(&[&one, &other, "--seconds", SECONDS]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let (code, together) = audit(&[&one, &other, "--domain", &domain]);
    assert_eq!((code, &together["violations"]), (Some(0), &Value::Array(Vec::new())), "{together}");
    assert!(bytes(&together, "merged_pages") > 1000, "{together}");
    assert!(bytes(&together, "frames") < bytes(&apart, "frames"), "{together}");
    // Two machines that are no domain may not have these.
    let (code, crossed) = audit(&[&one, &other]);
    let first = &crossed["violations"][0];
    assert_eq!((code, &first["merged"]), (Some(1), &true.into()), "{first}");
    assert!(first["text"].as_str().unwrap().contains("merged across sharing domains"), "{first}");
    let violations = crossed["violations"].as_array().unwrap().len();
    println!(
        "{} frames apart; {} with {} merged pages; {violations} across",
        apart["frames"], together["frames"], together["merged_pages"]
    );
    guests.iter_mut().for_each(sweep);
}
