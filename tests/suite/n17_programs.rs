//! Programs as actors: programs in sh and Python, requested by a mapper over the broker in memory.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nanite::agent::{ProgramActors, SkipReason};
use nanite::packet::{Failure, FailureCode, Payload};
use nanite::request::{Event, RequestError};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use crate::harness::WAIT_TIMEOUT;
use crate::harness::programs::{Programs, TestSystem, failure, mode, only, outcome, pid};
use crate::harness::system::{System, json};

#[tokio::test]
async fn n17_result_is_json_if_it_parses_else_text() {
    let programs = Programs::new(&[
        ("sh/json", "#!/bin/sh\nread -r n\necho \"{\\\"twice\\\": [$n, $n]}\"\n"),
        ("sh/text", "#!/bin/sh\nprintf 'two\\nlines\\n'\n"),
        ("sh/nothing", "#!/bin/sh\n"),
        ("sh/raw", "#!/bin/sh\nprintf '\\377'\n"),
        ("sh/index", "#!/bin/sh\necho 1\n"),
        ("sh/echo", "#!/bin/sh\ncat\n"),
        ("py/sum", "#!/usr/bin/env python3\nimport json, sys\nprint(sum(json.load(sys.stdin)))\n"),
    ]);
    let system = TestSystem::with(&programs).await;
    assert_eq!(system.request("/sh/json", 7).await, Ok(json(r#"{"twice":[7,7]}"#)));
    assert_eq!(system.request("/sh/text", ()).await, Ok("two\nlines".into()));
    assert_eq!(system.request("/sh/nothing", ()).await, Ok(json("null")));
    assert_eq!(system.request("/sh", ()).await, Ok(json("1")));
    assert_eq!(system.request("/py/sum", [1, 2, 3]).await, Ok(json("6")));
    let all = json(r#"{"text":"a\nb \u0000 ' \" $(touch x) ; ä","list":[1.5,null,true]}"#);
    assert_eq!(system.request("/sh/echo", &all).await, Ok(all));
    let raw = failure(FailureCode::BadAnswer, "the program wrote a standard output that is not UTF-8");
    assert_eq!(system.request("/sh/raw", ()).await, raw);
}

#[tokio::test]
async fn n17_intermediate_results_arrive_in_order_before_the_result() {
    let programs = Programs::new(&[(
        "count/to",
        "#!/usr/bin/env python3\nimport json, os, sys\nparts = os.fdopen(3, 'w')\n\
         for i in range(json.load(sys.stdin)):\n    parts.write(json.dumps({'key': 'odd' if i % 2 else 'even', 'value': i}) + '\\n')\n\
         parts.write('\\n{\"value\": \"no key\"}\\n{\"value\": \"no line break\"}')\nparts.flush()\nprint('done')\n",
    )]);
    let system = TestSystem::with(&programs).await;
    let mut events = system.events("/count/to", 500, WAIT_TIMEOUT).await;
    let mut seen = Vec::new();
    let result = loop {
        match events.next().await.unwrap() {
            Event::Intermediate { key, value, missed: 0, .. } => seen.push((key, value)),
            Event::Outcome { result, .. } => break result,
            other => panic!("{other:?}"),
        }
    };
    let mut expected: Vec<(String, Payload)> =
        (0..500).map(|i| (if i % 2 == 1 { "odd" } else { "even" }.to_owned(), json(&i.to_string()))).collect();
    expected.extend(["no key", "no line break"].map(|text| ("defaultkey".to_owned(), text.into())));
    assert_eq!(seen, expected);
    assert_eq!(result, Ok("done".into()));
    assert_eq!(events.next().await, None);
    // A push has no recipient for intermediate results; the program runs anyway.
    system.mapper.push("/count/to", 2000).await.unwrap();
}

#[tokio::test]
async fn n17_nonzero_exit_is_a_failure_with_the_end_of_stderr() {
    let programs = Programs::new(&[
        ("bad/exit", "#!/bin/sh\necho result\necho 'no \x1b[31mdisk\x07' >&2\nexit 3\n"),
        ("bad/quiet", "#!/bin/sh\nexit 255\n"),
        ("bad/long", "#!/bin/sh\nyes ä | head -n 100000 >&2\necho at last >&2\nexit 1\n"),
        ("bad/signal", "#!/bin/sh\nulimit -c 0\nkill -SEGV $$\n"),
        ("bad/parts", "#!/bin/sh\necho '{\"value\":1}' >&3\nexit 4\n"),
    ]);
    let system = TestSystem::with(&programs).await;
    assert_eq!(
        system.request("/bad/exit", ()).await,
        failure(FailureCode::Failed, "exit code 3: no \u{fffd}[31mdisk\u{fffd}")
    );
    assert_eq!(system.request("/bad/quiet", ()).await, failure(FailureCode::Failed, "exit code 255"));
    assert_eq!(system.request("/bad/signal", ()).await, failure(FailureCode::Failed, "ended by signal: 11 (SIGSEGV)"));
    let long = system.request("/bad/long", ()).await.unwrap_err();
    assert!(long.message.starts_with("exit code 1: ") && long.message.ends_with("ä\nä\nat last"), "{long}");
    assert!((4000..=Failure::MAX_MESSAGE_BYTES).contains(&long.message.len()), "{}", long.message.len());
    let mut events = system.events("/bad/parts", (), WAIT_TIMEOUT).await;
    assert_eq!(pid(&mut events).await, 1);
    assert_eq!(outcome(&mut events).await, failure(FailureCode::Failed, "exit code 4"));
}

#[tokio::test]
async fn n17_program_that_cannot_be_run_is_a_failure() {
    let programs = Programs::new(&[
        ("bad/interpreter", "#!/no/such/interpreter\n"),
        ("bad/binary", "\x7fELF that is none"),
        ("bad/revoked", "#!/bin/sh\n"),
        ("bad/opened", "#!/bin/sh\ntouch ran\n"),
        ("bad/removed", "#!/bin/sh\n"),
    ]);
    let cannot_run = |reason: &str| failure(FailureCode::Failed, &format!("the program cannot be run: {reason}"));
    let system = TestSystem::with(&programs).await;
    assert_eq!(system.request("/bad/interpreter", ()).await, cannot_run("its interpreter does not exist"));
    let broken = system.request("/bad/binary", ()).await.unwrap_err();
    assert_eq!(broken.code, FailureCode::Failed);
    // Changed after the scan: rejected before they run, or no longer offered.
    for (name, new_mode, reason) in [
        ("revoked", 0o644, "not executable by this process"),
        ("opened", 0o777, "writable by other users, who could decide what runs (chmod go-w)"),
    ] {
        mode(&programs.path(&format!("bad/{name}")), new_mode);
        match system.mapper.request(&format!("/bad/{name}"), ()).await {
            Ok(answers) => match only(answers.outcomes) {
                Err(failure) if failure.code == FailureCode::NoSuchService => {}
                other => assert_eq!(other, cannot_run(reason)),
            },
            Err(RequestError::NoTarget(_)) => {}
            Err(error) => panic!("{error}"),
        }
    }
    system.wait_for_services(&["/bad/binary", "/bad/interpreter", "/bad/removed"]).await;
    assert!(!programs.path("bad/ran").exists());
}

#[tokio::test]
async fn n17_program_need_not_read_its_input() {
    let programs = Programs::new(&[
        ("deaf/closes", "#!/bin/sh\nexec <&-\necho closed\n"),
        ("deaf/ignores", "#!/bin/sh\necho ignored\n"),
        ("deaf/half", "#!/bin/sh\nhead -c 10\n"),
        ("deaf/counts", "#!/bin/sh\nwc -c | tr -d ' '\n"),
    ]);
    let system = TestSystem::with(&programs).await;
    // Far more than fits into a pipe.
    let large = "x".repeat(4_000_000);
    assert_eq!(system.request("/deaf/closes", &large).await, Ok("closed".into()));
    assert_eq!(system.request("/deaf/ignores", &large).await, Ok("ignored".into()));
    assert_eq!(system.request("/deaf/half", &large).await, Ok("\"xxxxxxxxx".into()));
    assert_eq!(system.request("/deaf/counts", &large).await, Ok(json("4000003")));
}

#[tokio::test]
async fn n17_program_inherits_only_the_documented_environment() {
    let programs = Programs::new(&[
        ("see/environment", "#!/bin/sh\ntr '\\0' '\\n' < /proc/$$/environ\n"),
        ("see/arguments", "#!/bin/sh\necho \"$#\"\n"),
        ("see/directory", "#!/bin/sh\npwd -P\n"),
        ("see/group", "#!/bin/sh\necho $$; cut -d' ' -f5 /proc/$$/stat\n"),
        ("see/descriptors", "#!/bin/sh\nls -l /proc/$$/fd\n"),
    ]);
    // Without close-on-exec, as a shell, a supervisor or a C library may leave it.
    let secret = File::create(programs.path("secret")).unwrap();
    fcntl(&secret, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    let system = TestSystem::with(&programs).await;
    let text = async |service: &str| system.request(service, "x").await.unwrap().parse::<String>().unwrap();

    assert!(std::env::var_os("CARGO_MANIFEST_DIR").is_some(), "a variable that must not be inherited");
    let environment = text("/see/environment").await;
    let environment: BTreeMap<&str, &str> =
        environment.trim().lines().map(|line| line.split_once('=').unwrap()).collect();
    let short = ["PATH", "HOME", "LANG", "TZ", "TMPDIR", "USER"];
    for (name, value) in &environment {
        match *name {
            "NANITE_SERVICE" => assert_eq!(*value, "/see/environment"),
            "NANITE_CALLER" => assert_eq!(*value, "mapper-m1"),
            "NANITE_TOKEN" => assert_eq!(value.len(), 32),
            "NANITE_DEADLINE" => assert!(value.parse::<u64>().unwrap() > 1_700_000_000),
            name if short.contains(&name) || name.starts_with("LC_") => {
                assert_eq!(*value, std::env::var(name).unwrap());
            }
            name => panic!("{name} is inherited"),
        }
    }
    for name in ["PATH", "NANITE_SERVICE", "NANITE_CALLER", "NANITE_TOKEN", "NANITE_DEADLINE"] {
        assert!(environment.contains_key(name), "{name}");
    }

    assert_eq!(system.request("/see/arguments", "x").await, Ok(json("0")));
    let directory = programs.path("see").canonicalize().unwrap();
    assert_eq!(text("/see/directory").await, directory.to_str().unwrap());
    let group = text("/see/group").await;
    let (leader, group) = group.split_once('\n').unwrap();
    assert_eq!(leader, group);

    let descriptors = text("/see/descriptors").await;
    let descriptors: BTreeMap<i32, &str> = descriptors
        .lines()
        .filter_map(|line| line.split_once(" -> "))
        .map(|(listed, target)| (listed.rsplit(' ').next().unwrap().parse().unwrap(), target))
        .collect();
    assert_eq!(descriptors[&secret.as_raw_fd()], "/dev/null");
    for (number, target) in descriptors {
        let script = target.ends_with("see/descriptors");
        assert!(
            if number < 4 { target.starts_with("pipe:") } else { target == "/dev/null" || script },
            "{number}: {target}"
        );
    }
}

#[tokio::test]
async fn n17_directory_changes_are_advertised() {
    let programs = Programs::new(&[("a/one", "#!/bin/sh\necho 1\n")]);
    let system = TestSystem::with(&programs).await;
    system.wait_for_services(&["/a/one"]).await;
    assert_eq!(system.request("/a/one", ()).await, Ok(json("1")));

    programs.install("a/two", "#!/bin/sh\necho 2\n");
    programs.install("b/three", "#!/bin/sh\necho 3\n");
    system.wait_for_services(&["/a/one", "/a/two", "/b/three"]).await;
    assert_eq!(system.request("/b/three", ()).await, Ok(json("3")));

    programs.install("a/two", "#!/bin/sh\necho two\n");
    mode(&programs.path("b/three"), 0o644);
    fs::remove_file(programs.path("a/one")).unwrap();
    system.wait_for_services(&["/a/two"]).await;
    assert_eq!(system.request("/a/two", ()).await, Ok("two".into()));
    assert!(matches!(system.mapper.request("/a/one", ()).await, Err(RequestError::NoTarget(_))));

    mode(&programs.path("b/three"), 0o755);
    system.wait_for_services(&["/a/two", "/b/three"]).await;
    fs::remove_dir_all(programs.path("a")).unwrap();
    system.wait_for_services(&["/b/three"]).await;
    programs.install("a/four", "#!/bin/sh\necho 4\n");
    system.wait_for_services(&["/a/four", "/b/three"]).await;
}

#[tokio::test]
async fn n17_offers_only_selected_prefixes_and_safe_files() {
    let programs = Programs::new(&[
        ("a/good", "#!/bin/sh\necho good\n"),
        ("a/group", "#!/bin/sh\ntouch ran\n"),
        ("a/all", "#!/bin/sh\ntouch ran\n"),
        ("open/program", "#!/bin/sh\ntouch ran\n"),
        ("c/not_selected", "#!/bin/sh\n"),
    ]);
    mode(&programs.path("a/group"), 0o775);
    mode(&programs.path("a/all"), 0o757);
    mode(&programs.path("open"), 0o777);
    std::os::unix::fs::symlink("/bin/echo", programs.path("a/out")).unwrap();
    std::os::unix::fs::symlink("good", programs.path("a/in")).unwrap();
    let actors = ProgramActors::open_prefixes(programs.0.path(), ["a", "open"]).unwrap();
    let skipped: Vec<(String, SkipReason)> = actors
        .skipped()
        .into_iter()
        .map(|skipped| (skipped.path.file_name().unwrap().to_str().unwrap().to_owned(), skipped.reason))
        .collect();
    let expected = [
        ("all", SkipReason::WritableByOthers),
        ("group", SkipReason::WritableByOthers),
        ("out", SkipReason::SymlinkOutside),
        ("open", SkipReason::WritableByOthers),
    ];
    assert_eq!(skipped, expected.map(|(name, reason)| (name.to_owned(), reason)));
    let system = TestSystem::new(System::plain(), actors).await;
    system.wait_for_services(&["/a/good", "/a/in"]).await;
    assert_eq!(system.request("/a/in", ()).await, Ok("good".into()));
    for service in ["/a/group", "/a/all", "/a/out", "/open/program", "/c/not_selected"] {
        assert!(matches!(system.mapper.request(service, ()).await, Err(RequestError::NoTarget(_))), "{service}");
    }
}

#[tokio::test]
async fn n17_example_programs_run() {
    let programs = Programs::new(&[]);
    for name in ["disk/usage", "text/upper", "count/to"] {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/actors").join(name);
        assert_ne!(fs::metadata(&source).unwrap().permissions().mode() & 0o100, 0, "{name} is executable");
        programs.install(name, &fs::read_to_string(source).unwrap());
    }
    let system = TestSystem::new(System::secure(), programs.actors()).await;
    system.wait_for_services(&["/count/to", "/disk/usage", "/text/upper"]).await;
    assert_eq!(system.request("/text/upper", "straße").await, Ok("STRASSE".into()));
    assert_eq!(
        system.request("/text/upper", 5).await,
        failure(FailureCode::Failed, "exit code 1: the payload is not a string")
    );
    let usage: BTreeMap<String, u64> = system.request("/disk/usage", ()).await.unwrap().parse().unwrap();
    assert!(usage["used_percent"] <= 100 && usage["total_kib"] > 0, "{usage:?}");
    let mut events = system.events("/count/to", 3, WAIT_TIMEOUT).await;
    for number in 1..=3 {
        assert_eq!(pid(&mut events).await, number);
    }
    assert_eq!(outcome(&mut events).await, Ok(json("6")));
    let refused = failure(FailureCode::Failed, "exit code 2: the payload is not a number from 0 to 99999");
    for hostile in ["$(touch /tmp/x)", "1; touch x", "", "-1"] {
        assert_eq!(system.request("/count/to", hostile).await, refused, "{hostile:?}");
    }
}
