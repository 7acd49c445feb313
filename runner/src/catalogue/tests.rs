//! What the catalogue does with an SQLite file that is not as it should be. What it promises otherwise is tested on
//! both databases, by the workspace's tests.

use std::{fs, path::PathBuf};

use jiff::Timestamp;
use serde_json::Value;
use tempfile::TempDir;

use super::*;

fn place() -> (TempDir, PathBuf, Url) {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("a folder/catalogue.db");
    (dir, path.clone(), Url::Sqlite(path))
}

fn tree(path: &std::path::Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(path.parent().expect("a folder"))
        .expect("the folder")
        .map(|entry| entry.expect("an entry"))
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path()).expect("a file")))
        .collect();
    files.sort();
    files
}

fn run_on(url: &Url, statements: &[&'static str]) {
    install_default_drivers();
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let pool = AnyPool::connect(&url.driver_text()).await.expect("connect");
        for statement in statements {
            sqlx::raw_sql(*statement).execute(&pool).await.expect(statement);
        }
        pool.close().await;
    });
}

#[test]
fn it_is_made_durable_and_private() {
    use std::os::unix::fs::PermissionsExt;
    let (_dir, path, url) = place();
    let catalogue = Catalogue::open(&url).expect("made");
    let pragma = |name: &'static str| -> String {
        let read = async |pool: &AnyPool| {
            use sqlx::Row;
            let row = sqlx::query(name).fetch_one(pool).await?;
            Ok(row.try_get::<String, _>(0).or_else(|_| row.try_get::<i64, _>(0).map(|n| n.to_string()))?)
        };
        catalogue.read("look", read).expect(name)
    };
    assert_eq!(pragma("PRAGMA journal_mode"), "wal");
    assert_eq!(pragma("PRAGMA synchronous"), "2", "FULL");
    assert_eq!(fs::metadata(&path).expect("the file").permissions().mode() & 0o777, 0o600);
    drop(catalogue);
    Catalogue::open(&url).expect("once more");
    assert_eq!(tree(&path).len(), 1, "closed in order, nothing lies beside it");
}

#[test]
fn what_is_not_ours_is_refused_and_not_touched() {
    let (_dir, path, url) = place();
    fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
    for (content, what) in
        [("this is text, and long enough to be read as a header\n", "no SQLite database"), ("x", "no SQLite")]
    {
        fs::write(&path, content).expect("a file");
        let before = tree(&path);
        let error = Catalogue::open(&url).expect_err("foreign");
        assert!(matches!(&error, Error::Foreign { what: said, .. } if said.contains(what)), "{error:?}");
        assert_eq!(tree(&path), before);
    }
    for statements in
        [&["CREATE TABLE photo (id INTEGER)"][..], &["PRAGMA application_id = 7", "CREATE TABLE t (x TEXT)"]]
    {
        fs::remove_file(&path).expect("gone");
        run_on(&url, statements);
        let before = tree(&path);
        let error = Catalogue::open(&url).expect_err("foreign");
        assert!(matches!(error, Error::Foreign { .. }), "{error:?}");
        assert_eq!(tree(&path), before);
    }
}

#[test]
fn one_from_the_future_is_refused() {
    let (_dir, path, url) = place();
    drop(Catalogue::open(&url).expect("made"));
    run_on(&url, &["INSERT INTO form (number, name, checksum, made_at) VALUES (99, 'later', '', 0)"]);
    let before = tree(&path);
    let error = Catalogue::open(&url).expect_err("too new");
    assert!(matches!(error, Error::TooNew { found: 99, known: 1, .. }), "{error:?}");
    let after = tree(&path);
    assert_eq!(after.first(), before.first(), "the database was changed");
    // A released form that was edited is not the form it says it is.
    let statements = ["DELETE FROM form WHERE number = 99", "UPDATE form SET checksum = 'other' WHERE number = 1"];
    run_on(&url, &statements);
    let error = Catalogue::open(&url).expect_err("another form 1");
    assert!(matches!(error, Error::Damaged { .. }), "{error:?}");
}

#[test]
fn a_damaged_one_is_one_error_and_never_a_panic() {
    let (_dir, path, url) = place();
    let catalogue = Catalogue::open(&url).expect("made");
    for i in 0..40 {
        let event = Event { object: format!("o/{i}"), op: "x".repeat(500), ..Event::default() };
        catalogue.event(&event).expect("event");
    }
    drop(catalogue);
    let whole = fs::read(&path).expect("the file");
    let (mut refused, mut read) = (0, 0);
    for page in 0..whole.len() / 4096 {
        let mut bytes = whole.clone();
        let start = page * 4096 + if page == 0 { 100 } else { 0 };
        bytes[start..(page + 1) * 4096].fill(0xa5);
        fs::write(&path, &bytes).expect("damage");
        let outcome = Catalogue::open(&url).and_then(|c| c.events(0, &EventFilter::default()));
        match outcome {
            Err(Error::Damaged { .. }) => refused += 1,
            Err(other) => panic!("page {page}: {other:?}"),
            // A page that was not needed.
            Ok(events) => {
                assert_eq!(events.len(), 40, "page {page}: events were lost in silence");
                read += 1;
            }
        }
    }
    assert!(refused > 3, "{refused} refused, {read} read");
    // Cut short, anywhere.
    for len in [4096, whole.len() / 2, whole.len() - 4096, whole.len() - 1] {
        fs::write(&path, &whole[..len]).expect("cut");
        let outcome = Catalogue::open(&url).and_then(|c| c.events(0, &EventFilter::default()));
        assert!(matches!(outcome, Err(Error::Damaged { .. })), "cut to {len}: {outcome:?}");
    }
}

fn begun(catalogue: &Catalogue, job: Option<&str>, kind: &str) -> (SessionId, WorkId) {
    let session = NewSession {
        kind: kind.to_owned(),
        job: job.map(str::to_owned),
        initiator: "test".to_owned(),
        reason: None,
        retry_of: None,
    };
    let work = NewWork { job: session.job.clone(), ..NewWork::new(kind, "replica/r", 5, Value::Null) };
    let session = catalogue.begin_work(&session, &[work]).expect("begun");
    (session, catalogue.work_of(session).expect("its work")[0].id)
}

#[test]
fn work_is_passed_over_once_it_and_what_holds_it_have_been_due_for_a_while() {
    let (_dir, _path, url) = place();
    let catalogue = Catalogue::open(&url).expect("made");
    let (run, of_job) = begun(&catalogue, Some("dr"), "replication");
    begun(&catalogue, None, "operation");
    let now = Timestamp::now();
    catalogue.claim("a", &["operation"], now).expect("claim").expect("the operation");
    let state = || {
        assert!(catalogue.claim("b", &[], now).expect("claim").is_none(), "the object is in use");
        catalogue.work(of_job).expect("work").state
    };
    assert_eq!(state(), WorkState::Ready, "both are new");
    run_on(&url, &["UPDATE work SET queued_at = 0 WHERE job IS NOT NULL"]);
    assert_eq!(state(), WorkState::Ready, "it waited for a slot; what holds it may take a second");
    run_on(&url, &["UPDATE work SET queued_at = 0"]);
    catalogue.wish(run, Wish::Pause, "test", None).expect("paused");
    assert_eq!(state(), WorkState::Ready, "a run that is paused is left alone");
    catalogue.wish(run, Wish::Run, "test", None).expect("goes on");
    assert_eq!(state(), WorkState::Skipped);
}

#[test]
fn a_backup_whose_process_is_gone_refuses_no_way_home() {
    let (_dir, _path, url) = place();
    let catalogue = Catalogue::open(&url).expect("made");
    let spec = serde_json::json!({ "machine": "db01" });
    catalogue.enqueue(&NewWork::new("backup", "machine/db01", 5, spec)).expect("a backup");
    let refused = || crate::operate::refuse_backup(&catalogue, "db01").is_err();
    assert!(!refused(), "nobody has begun it");
    catalogue.claim("a", &[], Timestamp::now()).expect("claim").expect("the backup");
    assert!(refused() && crate::operate::refuse_backup(&catalogue, "db02").is_ok());
    run_on(&url, &["UPDATE work SET lease_until = 0"]);
    assert!(!refused(), "its lease is over, and nobody works here who would notice");
}
