//! Scenarios that are refused: with file, line, and what to do.
use crate::folder;
use plimsoll_policy::Rung;
use plimsoll_sim::Scenario;
use std::error::Error;
use std::path::Path;

const GOOD: &str = r#"title = "t"
[hosts]
count = 1
memory = "16G"
[[group]]
name = "tenant"
[[class]]
name = "web"
count = 2
memory = { size = "2G", reservation = "1G" }
demand = { constant = { active = "1G" } }
"#;

/// The sentence with which a text is refused.
fn refusal(text: &str) -> String {
    let error = Scenario::parse(text, Path::new("fleet.toml")).unwrap_err();
    let causes = std::iter::successors(error.source(), |cause| (**cause).source());
    causes.fold(error.to_string(), |sentence, cause| format!("{sentence}: {cause}"))
}

/// The good scenario with one piece of it exchanged.
fn with(good: &str, bad: &str) -> String {
    assert!(GOOD.contains(good), "{good}");
    refusal(&GOOD.replacen(good, bad, 1))
}

#[test]
fn the_scenario_that_is_spoilt_below_is_good() {
    Scenario::parse(GOOD, Path::new("fleet.toml")).unwrap();
}

#[test]
fn what_is_wrong_is_said_with_file_line_and_what_to_do() {
    let memory = r#"{ size = "2G", reservation = "1G" }"#;
    let demand = r#"{ constant = { active = "1G" } }"#;
    let mut wrong = Vec::new();
    for (good, bad, sentence) in [
        ("\"16G\"", "\"16Q\"", "fleet.toml:4: \"16Q\" is not a size such as \"512M\" or \"4G\""),
        ("\"16G\"", "\"-1G\"", "fleet.toml:4: \"-1G\" is not a size"),
        ("\"16G\"", "nan", "fleet.toml:4: invalid type: floating point `NaN`, expected a size"),
        (
            "\"16G\"",
            "\"512M\"",
            "fleet.toml:4: a host of 512M uses 1G itself and keeps 30.7M free: give it more memory",
        ),
        ("count = 1", "count = 0", "fleet.toml:3: 0 hosts: use 1 to"),
        ("count = 1", "cuont = 1", "fleet.toml:3: unknown field `cuont`"),
        ("count = 2", "count = -2", "fleet.toml:9: invalid value: integer `-2`"),
        ("count = 2", "count = 0", "fleet.toml:1: there is no machine: add a [[class]] with a count"),
        (
            memory,
            r#"{ startup = "1G", minimum = "2G", maximum = "1G" }"#,
            "fleet.toml:10: class web cannot be: vm1 has a minimum of 2G",
        ),
        (memory, r#"{ size = "2G", shares = 0 }"#, "fleet.toml:10: class web cannot be: vm1 has 0 shares"),
        (
            memory,
            r#"{ size = "2G", reservation = "3G" }"#,
            "fleet.toml:10: class web cannot be: vm1 reserves 3G",
        ),
        (memory, r#"{ size = "2G", weight = 3 }"#, "fleet.toml:10: memory is said in one way"),
        (memory, r#"{ reservation = "1G" }"#, "fleet.toml:10: memory without a size: add it"),
        (memory, r#"{ size = "0" }"#, "fleet.toml:10: class web cannot be: vm1 has a size of 0"),
        (memory, r#"{ size = "1000" }"#, "fleet.toml:10: class web cannot be: vm1 has a size of 1000 bytes"),
        (
            demand,
            r#"{ constant = { active = "3G" } }"#,
            "fleet.toml:11: a demand of 3G, more than the machine's size of 2G",
        ),
        (demand, r#"{ constant = { aktive = "1G" } }"#, "fleet.toml:11: unexpected keys in table: aktive"),
        (
            demand,
            r#"{ daily = { low = "2G", high = "1G", peak = "13:00" } }"#,
            "fleet.toml:11: a low of 2G above a high of 1G",
        ),
        (
            demand,
            r#"{ daily = { low = "1G", high = "2G", peak = "25:00" } }"#,
            "fleet.toml:11: \"25:00\" is not a time",
        ),
        (
            demand,
            r#"{ bursts = { low = "1G", high = "2G", every = "1m", lasts = "2m" } }"#,
            "fleet.toml:11: bursts of 2 m every 1 m",
        ),
        (demand, r#"{ sometimes = {} }"#, "fleet.toml:11: unknown variant `sometimes`"),
        (
            "name = \"tenant\"",
            "name = \"tenant\"\nparent = \"tenant\"",
            "fleet.toml:6: group tenant cannot be: ",
        ),
        (
            "name = \"tenant\"",
            "name = \"tenant\"\nparent = \"nobody\"",
            "fleet.toml:7: there is no group nobody",
        ),
        (
            "name = \"tenant\"",
            "name = \"tenant\"\nshares = 0",
            "fleet.toml:6: group tenant cannot be: group1 has 0 shares",
        ),
        ("name = \"web\"", "name = \"web\"\ngroup = \"nobody\"", "fleet.toml:9: there is no group nobody"),
        ("name = \"web\"", "name = \"web\"\nskew = \"150%\"", "fleet.toml:9: a skew of 150 %"),
        ("name = \"web\"", "name = \"web\"\nprocessors = 0", "fleet.toml:9: 0 processors: use 1 to 4096"),
        (
            "title = \"t\"",
            "title = \"t\"\nidle_tax = \"100%\"",
            "fleet.toml:2: an idle tax of 100 % is too high",
        ),
        (
            "title = \"t\"",
            "title = \"t\"\nduration = \"0s\"",
            "fleet.toml:2: a duration of less than a second",
        ),
        ("title = \"t\"", "title = ", "fleet.toml:1: "),
    ] {
        let found = with(good, bad);
        if !found.starts_with(sentence) || found.contains('\n') {
            wrong.push(format!("{bad}\n found {found}\nwanted {sentence}\n"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.concat());
}

#[test]
fn groups_that_are_nested_in_each_other_are_refused() {
    let cycle = "name = \"tenant\"\nparent = \"other\"\n[[group]]\nname = \"other\"\nparent = \"tenant\"";
    let found = with("name = \"tenant\"", cycle);
    assert!(
        found.starts_with("fleet.toml:6: group tenant cannot be: ")
            || found.starts_with("fleet.toml:9: group other"),
        "{found}"
    );
}

#[test]
fn a_class_that_restarts_must_be_there() {
    let restart = format!("{GOOD}[[restart]]\nclass = \"db\"\nat = \"01:00\"\n");
    assert_eq!(refusal(&restart), "fleet.toml:13: there is no class db: name one that there is");
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let error = Scenario::read(&folder().join("nowhere.toml")).unwrap_err();
    assert!(error.to_string().ends_with("nowhere.toml cannot be read"), "{error}");
}

#[test]
fn costs_come_from_the_file_that_is_named_and_what_is_said_beside_it_counts_more() {
    let folder = tempfile::tempdir().unwrap();
    let (fleet, costs) = (folder.path().join("fleet.toml"), folder.path().join("costs.json"));
    let text = format!("{GOOD}[costs]\nfile = \"costs.json\"\ncompress = {{ take = \"7us\" }}\n");
    let missing = Scenario::parse(&text, &fleet).unwrap_err().to_string();
    assert!(missing.starts_with(&format!("{}:13: there are no such costs: ", fleet.display())), "{missing}");

    std::fs::write(&costs, "{\"source\": \"mine\", \"compress\": {\"take_ns\": 9000, \"back_ns\": 3000}}")
        .unwrap();
    let compress = Scenario::parse(&text, &fleet).unwrap().physics.costs.of(Rung::Compress);
    assert_eq!((compress.take_ns, compress.back_ns), (7000, 3000));

    std::fs::write(&costs, "{\"source\": \"mine\",\n\"disk\": {\"busy_ppm\": [2000000, 0, 0, 0, 0, 0]}}")
        .unwrap();
    let wrong = Scenario::parse(&text, &fleet).unwrap_err().to_string();
    let expected = "2: a loss of 2000000 millionths: a guest loses at most all, 1000000";
    assert_eq!(wrong, format!("{}:{expected}", costs.display()));
}
