//! Promise: what is generated is what is shipped.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::harness::Room;

/// `AQUIFER_BLESS=1` writes the page anew.
#[test]
fn the_reference_page_is_the_tree() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/cli.md");
    let page = aquifer_runner::cli::reference();
    if std::env::var_os("AQUIFER_BLESS").is_some() {
        fs::write(&path, &page).expect("write docs/cli.md");
    }
    let kept = fs::read_to_string(&path).expect("docs/cli.md");
    assert!(
        kept == page,
        "docs/cli.md is old; write it anew with AQUIFER_BLESS=1 cargo test -p aquifer --test cli docs"
    );
}

/// The words of `docs/site.md` before its reference.
const SITE_HEAD: &str = "# The site file\n\nOne site in one file: `-c SITE.toml`, or `$AQUIFER_CONFIG`, or `aquifer.toml` in the configuration folder.\n`aquifer config check` reads it, proves every name in it and says when each job runs next; `aquifer config schema`\nprints a JSON Schema for editors. Names are the cross-reference. A secret never stands in the file.\n\nThis page is generated from the list of keys that the reader itself uses.\n\n```toml\n";

/// `AQUIFER_BLESS=1` writes the page anew.
#[test]
fn the_page_of_the_site_file_is_what_the_reader_takes() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let sample = fs::read_to_string(root.join("src/site/sample.toml")).expect("sample.toml");
    let page = format!("{SITE_HEAD}{sample}```\n\n{}", aquifer_runner::site::schema::reference());
    let path = root.join("../docs/site.md");
    if std::env::var_os("AQUIFER_BLESS").is_some() {
        fs::write(&path, &page).expect("write docs/site.md");
    }
    let kept = fs::read_to_string(&path).expect("docs/site.md");
    assert!(
        kept == page,
        "docs/site.md is old; write it anew with AQUIFER_BLESS=1 cargo test -p aquifer --test cli docs"
    );
    let room = Room::new();
    fs::write(room.path("site.toml"), sample).expect("write");
    // Exit 1: it says what this build leaves undone.
    let checked = room.run(["-c", &room.text("site.toml"), "config", "check"]);
    assert_eq!(checked.code, 1, "{}", checked.stderr);
    assert!(checked.stdout.contains("job hourly: backup, 20"), "{}", checked.stdout);
    assert!(checked.stderr.contains("[notify]: nothing is sent"), "{}", checked.stderr);
    let schema = room.json(["config", "schema"]).one("schema");
    assert_eq!(schema["json_schema"]["properties"]["version"]["maximum"], 1);
}

/// The blocks of a page that begin with this fence.
fn blocks<'p>(page: &'p str, fence: &str) -> Vec<&'p str> {
    page.split(&format!("```{fence}\n")).skip(1).filter_map(|rest| rest.split("```").next()).collect()
}

/// Ends the machine of a page whatever becomes of the test.
struct Started(PathBuf);

impl Drop for Started {
    fn drop(&mut self) {
        if let Ok(number) = fs::read_to_string(&self.0) {
            let _ = Command::new("kill").args(["-9", number.trim()]).status();
        }
    }
}

#[test]
fn a_machine_that_is_started_as_the_page_says_is_seen_and_counted() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/machines.md");
    let page = fs::read_to_string(path).expect("docs/machines.md");
    let room = Room::new();
    let here = |text: &str| text.replace("/srv/prod", &room.text("p")).replace("/run/prod", &room.text("r"));
    let [host, description] = blocks(&page, "toml")[..] else { panic!("a site's part and a description") };
    let dir = room.dir.path().display();
    room.write_site(&format!(
        "version = 1\nhome = \"{dir}/home\"\n[repository]\nnas = {{ url = \"{dir}/repo\" }}\n{}\n[job.b]\nkind = \"backup\"\nmachines = [\"db01\"]\nto = \"nas\"\n",
        here(host)
    ));
    room.ok(["init"]);
    fs::create_dir_all(room.path("p/db01")).expect("folder");
    fs::write(room.path("p/db01/machine.toml"), description).expect("a description");
    let disk = room.text("p/db01/vda.qcow2");
    assert!(
        Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", &disk, "64M"]).status().expect("it").success()
    );
    let site = room.text("site.toml");
    let checked = room.json(["-c", &site, "config", "check"]);
    assert!(checked.code == 0 && checked.kind("undescribed").is_empty(), "{}", checked.stdout);
    let _started = Started(room.path("r/db01/qemu.pid"));
    let started = Command::new("sh").arg("-ec").arg(here(blocks(&page, "sh")[0])).status();
    assert!(started.expect("sh").success());
    let found = || room.json(["-c", &site, "run", "b"]).one("disk")["found"].clone();
    assert_ne!(found()["by"], "dirty_context");
    assert_eq!(found()["by"], "dirty_context");
    // Every key that is read has its row.
    for key in ["version", "name", "uuid", "firmware", "machine_type", "nvram", "cpus", "memory"] {
        assert!(page.contains(&format!("| `{key}` |")), "{key}");
    }
    for key in ["disk.name", "disk.bus", "disk.source", "disk.boot_order", "nic.mac", "nic.model", "nic.network"] {
        assert!(page.contains(&format!("| `{key}` |")), "{key}");
    }
}

#[test]
fn man_pages_and_completions_come_for_every_verb() {
    let room = Room::new();
    let out = room.text("man");
    room.ok(["man", "--out", &out]);
    for (_, verbs) in aquifer_runner::cli::GROUPS {
        for verb in *verbs {
            let page = fs::read_to_string(room.path(format!("man/aquifer-{verb}.1"))).expect(verb);
            assert!(page.contains(".SH NAME") && page.contains(".SH OPTIONS"), "{verb}: {page}");
        }
    }
    for shell in ["bash", "zsh", "fish"] {
        let script = room.ok(["completions", shell]).stdout;
        assert!(script.contains("recover") && script.contains("allow-backing"), "{shell}");
        assert!(!script.contains("snapshots"), "{shell} offers a hidden alias");
    }
}
