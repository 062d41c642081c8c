#![allow(clippy::unwrap_used, clippy::panic)]
use super::*;

#[test]
fn messages_of_every_layer_are_recognised() {
    let rows = [
        ("out of device memory allocating 4096 bytes\n<backtrace>", Some(4096)),
        ("can't allocate buffer of size: 4294967296\n", Some(4_294_967_296)),
        // As it comes out of a read on software Vulkan.
        (
            "Error while reading data: use `try_into_data` instead to catch the error at runtime: An error happened during \
             execution\nCaused by:\n  Several failures at once\nCaused by:\n  The bytes were never written (failure #15348, still \
             claiming 3 buffer(s))\nCaused by:\n  An IO error happened\nCaused by:\n  can't allocate buffer of size: \
             190488576\nNo backtrace available",
            Some(190_488_576),
        ),
        ("CUDA_ERROR_OUT_OF_MEMORY", None),
        ("An out-of-memory error happened during launch", None),
        ("wgpu error: Out of Memory", None),
        ("VK_ERROR_OUT_OF_DEVICE_MEMORY", None),
    ];
    for (message, bytes) in rows {
        assert_eq!(shortage(message), Some(Shortage { bytes }), "{message}");
    }
    for message in ["index out of bounds: the len is 3", "remember the memory", "buffer of size: 12"] {
        assert_eq!(shortage(message), None, "{message}");
    }
}

#[test]
fn a_panic_for_want_of_memory_is_an_error_and_any_other_goes_on() {
    assert_eq!(catch(|| 7), Ok(7));
    let caught: Result<(), Shortage> =
        catch(|| panic!("Error while reading data: out of device memory allocating 12 bytes"));
    assert_eq!(caught, Err(Shortage { bytes: Some(12) }));
    let other = std::panic::catch_unwind(|| catch::<()>(|| panic!("index out of bounds")));
    assert_eq!(text(other.unwrap_err().as_ref()), "index out of bounds");
}

#[test]
fn the_error_names_what_holds_the_memory_and_what_to_change() {
    let held = Held { weights: 10 << 20, adapter: 1 << 20, optimizer: 2 << 20 };
    let shortage = Shortage { bytes: Some(3 << 30) };
    let unloaded = blame(Doing::Step(1), &held, 5 << 20, None);
    assert_eq!(unloaded, "the weights alone are 10.0 MiB");
    let rest = blame(Doing::Step(4), &held, 14 << 20, None);
    assert_eq!(
        message("cuda:0 (H200)", Doing::Step(4), &shortage, &rest),
        "device cuda:0 (H200) is out of memory in step 4 or in one before it that was not read yet: a buffer of 3.00 GiB could \
         not be had; weights 10.0 MiB, adapter 1.00 MiB, optimizer 2.00 MiB are held between steps; the rest is activations \
         and gradients"
    );
    let saving = Suggestion {
        set: vec!["training.gradient_checkpointing=block".to_owned()],
        cost: "about a third more time",
        saves_bytes: 1 << 30,
        peak_bytes: 1,
    };
    assert_eq!(
        hint(&[saving]),
        "--set 'training.gradient_checkpointing=block' (saves 1.00 GiB: about a third more time); lowrank-train plan --config \
         FILE shows what a run needs"
    );
    assert!(hint(&[]).contains("training.micro_batch_size"));
}

#[test]
fn measured_and_predicted_stand_side_by_side() {
    let held = Held { weights: 100, adapter: 0, optimizer: 40 };
    let found = measured(&held, 20, 200);
    assert_eq!(found.values().sum::<u64>(), 200);
    assert_eq!(
        comparison(&found, Some(&[("temporary".to_owned(), 30)].into())),
        "weights 100 B, gradients 20 B, optimizer 40 B, temporary 40 B (predicted 30 B)"
    );
}
