//! Runs the C++ of attention in fragments on the CPU: the text that a card's compiler gets, with CUDA's words given a meaning on
//! threads (`emulated/cuda.hpp`), beside the equations in doubles (`emulated/main.cpp`). Shows that tiles, strides, layouts and
//! synchronisation are right; what a card's own compiler makes of it is checked on the card (`attention/trial.rs`).
//!
//! Needs a C++20 compiler with `_Float16` (`CXX`, else `c++`).

use std::path::Path;
use std::process::Command;

use cubecl::ir::AddressType;
use cubecl_cuda::compiler::CudaBackend;

use super::Offline;
use super::rows::ROWS;

/// The row that is run: heads of 80 numbers, tiles of 32 x 32, softcap.
const LABEL: &str = "f16 fragments capped";
const SIZES: &str = "static const int WIDTH = 80;\nstatic const unsigned FORWARD_QUERIES = 32, BACKWARD_QUERIES = 32, \
                     BACKWARD_KEYS = 32;\n";

/// The kernel in a namespace, as a function of a thread; `V` is the vector type of its tensors.
fn as_function(text: &str, namespace: &str) -> String {
    let (_, text) = text.split_once("#include <cuda_fp16.h>").unwrap();
    let (before, rest) = text.split_once("extern \"C\" __global__ void").unwrap();
    let arguments = &rest[rest.find(&format!("{namespace}_kernel")).unwrap()..];
    let arguments = &arguments[arguments.find('(').unwrap()..];
    let vector = arguments[1..].split_whitespace().next().unwrap();
    let (declared, body) = arguments.split_once("extern __shared__ __align__(32) char ").unwrap();
    let (name, body) = body.split_once("[];").unwrap();
    let before: String =
        before.lines().filter(|line| !line.starts_with("#include")).map(|line| format!("{line}\n")).collect();
    format!(
        "namespace {namespace} {{\n{before}typedef {vector} V;\nstatic void kernel{declared}char* const {name} = \
         shared_memory;{body}\n}}\n"
    )
}

#[test]
fn codegen_of_fragments_computes_attention() {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    if Command::new(&compiler).arg("--version").output().is_err() {
        eprintln!("no C++ compiler ({compiler}): nothing was run");
        return;
    }
    let offline = Offline::new();
    let kernels = ["forward", "query_gradient", "key_gradient"].map(|namespace| {
        let function = format!("{namespace}_kernel");
        let row = ROWS.iter().find(|row| row.function == function && row.label.starts_with(LABEL)).unwrap();
        as_function(&offline.cuda(row, AddressType::U32, CudaBackend::Cpp).unwrap(), namespace)
    });
    let folder = std::env::temp_dir().join(format!("lowrank-emulated-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.join(name), text).unwrap();
    write("cuda.hpp", include_str!("emulated/cuda.hpp"));
    write("main.cpp", include_str!("emulated/main.cpp"));
    write("kernels.hpp", &format!("{SIZES}{}", kernels.concat()));
    let run = |program: &Path, arguments: &[&str]| {
        let done = Command::new(program).args(arguments).current_dir(&folder).output().unwrap();
        assert!(done.status.success(), "{}: {}", program.display(), String::from_utf8_lossy(&done.stderr));
        String::from_utf8_lossy(&done.stdout).into_owned()
    };
    run(Path::new(&compiler), &["-std=c++20", "-O1", "-w", "-pthread", "main.cpp", "-o", "attention"]);
    let results = run(&folder.join("attention"), &[]);
    std::fs::remove_dir_all(&folder).unwrap();
    eprint!("{results}");
    assert_eq!(results.lines().count(), 5, "{results}");
    for line in results.lines() {
        let numbers: Vec<f64> = line.split(' ').skip(1).map(|number| number.parse().unwrap()).collect();
        // weights and results in f16: half a unit in the last place each, and sums of some dozen of them
        assert!(numbers[0] <= 2e-3 * numbers[1], "{line}");
    }
}
