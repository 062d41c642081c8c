//! A disk that becomes full while the run writes.
#![cfg(unix)]

use crate::workplace::Workplace;
use crate::{PROGRAM, faults};

/// A resumed run that cannot write its next checkpoint, by a limit on the size of files, leaves the earlier one as it was, and
/// goes on from it once there is space.
#[test]
fn a_checkpoint_that_does_not_fit_leaves_the_earlier_ones() {
    let place = Workplace::new();
    let first = place.run(PROGRAM, &["--config", "run.toml", "--set", "training.save_steps=1"]);
    assert!(first.status.success(), "{}", String::from_utf8_lossy(&first.stderr));
    let kept = |place: &Workplace| {
        let mut files = place.files();
        files.retain(|path, _| path.to_string_lossy().contains("/out/checkpoints/") || path.ends_with("out/notes.txt"));
        files
    };
    let (before, adapter) = (kept(&place), place.read("out/adapter/adapter_model.safetensors"));

    let resumed =
        ["--config", "run.toml", "--set", "training.max_steps=2", "--set", "training.resume_from_checkpoint=true"];
    // 16 blocks of 512 bytes; without the trap the signal would end the process.
    let limited = ["-c", "trap '' XFSZ; ulimit -f 16; exec \"$0\" \"$@\"", PROGRAM];
    let output = place.run("sh", &[&limited[..], &resumed].concat());
    let says = ["cannot write the checkpoint", "parameters.safetensors: File too large", "hint: "];
    let found = faults(&output, 1, &says);
    assert!(found.is_empty(), "{found:?}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(kept(&place) == before, "checkpoints changed");
    assert!(place.read("out/adapter/adapter_model.safetensors") == adapter, "the adapter changed");

    let output = place.run(PROGRAM, &resumed);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(place.path("out/checkpoints/step-2/complete.json").is_file());
}

/// The same on a real file system of 64 KiB, where this user may mount one in a namespace of its own.
#[test]
fn a_full_disk_is_named() {
    let script = "mkdir full && mount -t tmpfs -o size=64k none full || exit 77; \
                  mkdir full/out && echo kept > full/out/notes.txt; \
                  \"$0\" --config run.toml --out full/out; code=$?; \
                  cat full/out/notes.txt; ls -A full/out/checkpoints; exit $code";
    for namespace in [&["--mount"][..], &["--user", "--map-root-user", "--mount"]] {
        let place = Workplace::new();
        let output = place.run("env", &[&["unshare"], namespace, &["sh", "-c", script, PROGRAM]].concat());
        let is_allowed =
            !matches!(output.status.code(), Some(77 | 126 | 127)) && !output.stderr.starts_with(b"unshare");
        if is_allowed {
            let says = [
                "no space left on the disk while writing full/out/checkpoints/",
                "No space left on device",
                "hint: free some space",
            ];
            let found = faults(&output, 1, &says);
            assert!(found.is_empty(), "{found:?}\n{}", String::from_utf8_lossy(&output.stderr));
            assert_eq!(String::from_utf8_lossy(&output.stdout), "kept\n");
            return;
        }
    }
    eprintln!("not run: this user may not mount a file system");
}
