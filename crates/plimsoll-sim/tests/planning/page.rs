//! The page and the text of a small scenario.
use crate::report;
use plimsoll_sim::{Report, Scenario, html, text};
use std::path::Path;

/// Six machines on two hosts that are too small for what they keep, and one that fits nowhere.
const SMALL: &str = r#"
title = "Small & <quick>"
duration = "20m"
hosts = { count = 2, memory = "4G", own = "512M" }
placement = { within = "1m" }

[[class]]
name = "worker"
count = 6
memory = { size = "2G", reservation = "512M" }
demand = { bursts = { low = "300M", high = "900M", every = "10m", lasts = "2m" } }
keeps = "1500M"

[[class]]
name = "giant"
count = 1
memory = { static = "8G" }
demand = { idle = {} }
"#;

fn small() -> Report {
    report(&Scenario::parse(SMALL, Path::new("small.toml")).unwrap(), 1)
}

/// Whether all tags are closed in order, all attributes quoted, and every entity one of the five. Returns the tags.
fn tags(page: &str) -> Result<Vec<String>, String> {
    let (mut open, mut all, mut rest) =
        (Vec::new(), Vec::new(), page.strip_prefix("<!DOCTYPE html>").unwrap_or(page));
    while let Some((text, after)) = rest.split_once('<') {
        for (start, _) in text.match_indices('&') {
            let known =
                ["&amp;", "&lt;", "&gt;", "&quot;"].iter().any(|entity| text[start..].starts_with(entity));
            known.then_some(()).ok_or_else(|| format!("a bare & in {text:?}"))?;
        }
        let (tag, after) = after.split_once('>').ok_or("a tag without its end")?;
        rest = after;
        if tag.matches('"').count() % 2 != 0 || tag.contains('<') {
            return Err(format!("an attribute is not quoted in {tag:?}"));
        }
        let name = tag.trim_matches('/').split_whitespace().next().unwrap_or_default().to_owned();
        if tag.starts_with('/') {
            let last = open.pop();
            if last.as_deref() != Some(&*name) {
                return Err(format!("{name} closes {last:?}"));
            }
        } else {
            all.push(name.clone());
            if !tag.ends_with('/') {
                open.push(name);
            }
        }
    }
    if open.is_empty() { Ok(all) } else { Err(format!("left open: {open:?}")) }
}

#[test]
fn the_page_is_well_formed_needs_nothing_else_and_has_three_pictures() {
    let page = html(&small());
    let tags = tags(&page).unwrap();
    assert_eq!(tags.iter().filter(|tag| *tag == "svg").count(), 3);
    assert!(!tags.iter().any(|tag| tag == "script"));
    assert!(
        !page.contains("src=") && !page.contains("href=") && !page.contains("url("),
        "it fetches something"
    );
    assert!(page.contains("prefers-color-scheme: dark"));
    assert!(page.contains("Small &amp; &lt;quick&gt;") && !page.contains("<quick>"));
}

#[test]
fn the_check_of_pages_sees_what_is_wrong() {
    for wrong in ["<p>", "<p></b>", "<p>&nbsp;</p>", "<p class=\"a>b</p>", "<p", "<b><p></b></p>"] {
        assert!(tags(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn what_found_no_host_is_said_with_the_arithmetic() {
    let report = small();
    assert!(!report.holds);
    assert_eq!((report.unplaced.len(), report.unplaced[0].machines), (1, 1));
    let because = &report.unplaced[0].because;
    assert!(because.contains("the host has 4G for machines") && because.contains("is reserved"), "{because}");
    assert!(report.verdict.starts_with("It does not fit: 1 machine found no host."), "{}", report.verdict);
}

/// Every figure of a small run, so that a change of the model is seen and not slipped in. `PLIMSOLL_BLESS=1` writes it anew.
#[test]
fn a_small_run_is_the_one_on_record() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/planning/small.txt");
    let found = text(&small());
    if std::env::var_os("PLIMSOLL_BLESS").is_some() {
        std::fs::write(&path, &found).unwrap();
    }
    assert_eq!(found, std::fs::read_to_string(&path).unwrap());
}
