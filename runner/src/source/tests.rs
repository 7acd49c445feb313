//! The table of SOURCE words.

use super::*;

fn existing(path: &Path) -> bool {
    ["db02", "a@b", "disk:1", "latest", "x@latest"].iter().any(|f| Path::new(f) == path)
}

fn parse(word: &str) -> Result<Source> {
    Source::parse_with(word, existing)
}

fn point(machine: &str, point: PointRef, disk: Option<&str>) -> Source {
    Source::Point { machine: machine.into(), point, disk: disk.map(Into::into) }
}

fn at(text: &str) -> PointRef {
    PointRef::At(text.parse().expect("a time"))
}

#[test]
fn words_that_mean_something() {
    let path = |p: &str| Source::Path(p.into());
    let raw = |p: &str| Source::Raw(p.into());
    let nbd = |u: &str| Source::Nbd(u.into());
    let latest = PointRef::Latest;
    let id = |i: &str| PointRef::Id(i.into());
    let table = [
        ("/mnt/db01.vbk", path("/mnt/db01.vbk")),
        ("./db01", path("./db01")),
        ("images/db01@latest", path("images/db01@latest")),
        ("dir/", path("dir/")),
        ("/a/2026-11-20T22:00:00Z", path("/a/2026-11-20T22:00:00Z")),
        ("db02", path("db02")),
        ("a@b", path("a@b")),
        ("disk:1", path("disk:1")),
        ("latest", path("latest")),
        ("x@latest", path("x@latest")),
        ("raw:disk.img", raw("disk.img")),
        ("raw:/dev/vg0/db01", raw("/dev/vg0/db01")),
        ("raw:nbd://x", raw("nbd://x")),
        ("raw:a:b@c", raw("a:b@c")),
        ("nbd://host", nbd("nbd://host")),
        ("nbd://host:10810/vda", nbd("nbd://host:10810/vda")),
        ("nbds://[::1]/x", nbd("nbds://[::1]/x")),
        ("NBD://host/x", nbd("NBD://host/x")),
        ("nbd+unix:///?socket=/run/x", nbd("nbd+unix:///?socket=/run/x")),
        ("nbds+unix:///vda?socket=s", nbd("nbds+unix:///vda?socket=s")),
        ("db01", point("db01", latest(0), None)),
        ("db01:vda", point("db01", latest(0), Some("vda"))),
        ("db01:scsi:2", point("db01", latest(0), Some("scsi:2"))),
        ("db01@latest", point("db01", latest(0), None)),
        ("db01@latest:vda", point("db01", latest(0), Some("vda"))),
        ("db01@latest~0", point("db01", latest(0), None)),
        ("db01@latest~2", point("db01", latest(2), None)),
        ("db01@latest~12:vdb", point("db01", latest(12), Some("vdb"))),
        ("db01@2026-11-20T22:00:00Z", point("db01", at("2026-11-20T22:00:00Z"), None)),
        ("db01@2026-11-20T22:00:00Z:vda", point("db01", at("2026-11-20T22:00:00Z"), Some("vda"))),
        ("db01@2026-11-20t22:00:00z", point("db01", at("2026-11-20T22:00:00Z"), None)),
        ("db01@2026-11-20T22:00Z", point("db01", at("2026-11-20T22:00:00Z"), None)),
        ("db01@2026-11-20T22:00:00.25Z:vda", point("db01", at("2026-11-20T22:00:00.25Z"), Some("vda"))),
        ("db01@2026-11-20T22:00:00+01:00", point("db01", at("2026-11-20T21:00:00Z"), None)),
        ("db01@2026-11-20T22:00:00+01:00:30", point("db01", at("2026-11-20T21:00:00Z"), Some("30"))),
        ("db01@2026-11-20T22:00-03:30:vda", point("db01", at("2026-11-21T01:30:00Z"), Some("vda"))),
        ("db01@0193", point("db01", id("0193"), None)),
        ("db01@01932C1E-7d:vda", point("db01", id("01932c1e-7d"), Some("vda"))),
        ("db01@01932c1e-7d20-7a5c-8f3e-0123456789ab", point("db01", id("01932c1e-7d20-7a5c-8f3e-0123456789ab"), None)),
        ("web@site", point("web@site", latest(0), None)),
        ("web@site:vda", point("web@site", latest(0), Some("vda"))),
        ("web@site@latest", point("web@site", latest(0), None)),
        ("web@site@latest~1:vda", point("web@site", latest(1), Some("vda"))),
        ("web@site@2026-11-20T22:00:00Z", point("web@site", at("2026-11-20T22:00:00Z"), None)),
        ("web@latest:disk@beef", point("web", latest(0), Some("disk@beef"))),
        ("web@beef", point("web", id("beef"), None)),
        ("web@bee", point("web@bee", latest(0), None)),
        ("Größe 1", point("Größe 1", latest(0), None)),
    ];
    assert!(table.len() >= 40);
    for (word, want) in table {
        match parse(word) {
            Ok(got) => assert_eq!(got, want, "{word}"),
            Err(fail) => panic!("{word}: {fail}"),
        }
    }
}

#[test]
fn words_that_are_refused() {
    let table = [
        "",
        "raw:",
        "http://host/x",
        "s3://bucket/db01",
        "file:///disk",
        "db01@",
        "db01@:vda",
        "db01:",
        "@latest",
        ":vda",
        "db01@latest:",
        "db01@latest~",
        "db01@latest~x",
        "db01@latest~-1",
        "db01@latest~99999999999",
        "db01@2026-11-20",
        "db01@2026-11-20T22:00:00",
        "db01@2026-11-20T22:00",
        "db01@2026-11-20T22:00:00:vda",
        "db01@2026-11-20 22:00:00Z",
        "db01@2026-13-20T22:00:00Z",
        "db01@2026-11-20T25:00:00Z",
        "db01@2026-11-20T22:00:00Zulu",
        "db01@2026-11-20T22:00:00CET",
    ];
    for word in table {
        match parse(word) {
            Ok(got) => panic!("{word} was taken as {got:?}"),
            Err(fail) => assert_eq!((fail.code, fail.exit()), (Code::Source, 4), "{word}"),
        }
    }
}
