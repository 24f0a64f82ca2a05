//! A CUDA kernel as a program for this machine: its source, with every assembler line as a call of a function in `units.h`.

use regex_lite::{Captures, Regex};
use std::fmt::Write;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

/// Where buffers begin in the file that the program maps.
const PAGE: usize = 4096;

/// A program that runs a kernel's cubes.
pub(crate) struct Program {
    folder: TempDir,
    units: u32,
}

impl Program {
    /// Of a kernel's CUDA; `units`: of a cube.
    pub(crate) fn new(source: &str, units: u32) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kernel.cc");
        std::fs::write(&path, translate(source)).unwrap();
        let header = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/on_cpu");
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_string());
        // No product and sum at once, but where the kernel says so: both kernels of a pair would have to.
        let out = Command::new(&compiler)
            .args(["-O1", "-std=c++20", "-w", "-mfma", "-mf16c", "-ffp-contract=off", "-fno-strict-aliasing"])
            .args(["-fno-stack-protector", "-o"])
            .arg(folder.path().join("kernel"))
            .arg("-I")
            .arg(header)
            .arg(&path)
            .output();
        let out =
            out.unwrap_or_else(|e| panic!("these tests need a C++ compiler (Debian: g++); {compiler}: {e}"));
        let errors = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{compiler}: {}", errors.chars().take(4000).collect::<String>());
        Program { folder, units }
    }

    /// Runs `cubes` cubes with scalars and buffers, in the order of the kernel's arguments.
    pub(crate) fn run(&self, cubes: [u32; 3], scalars: &[u32], buffers: &mut [&mut [u8]]) {
        let mut file = Vec::new();
        let mut places = Vec::new();
        for buffer in buffers.iter() {
            places.push(file.len());
            file.extend_from_slice(buffer);
            file.resize(file.len().next_multiple_of(PAGE), 0);
        }
        let path = self.folder.path().join("buffers");
        std::fs::write(&path, &file).unwrap();
        let out = Command::new(self.folder.path().join("kernel"))
            .arg(&path)
            .args(
                cubes.iter().chain([&self.units, &(scalars.len() as u32)]).chain(scalars).map(u32::to_string),
            )
            .args(places.iter().map(usize::to_string))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success(), "{}: {said}", out.status);
        let file = std::fs::read(&path).unwrap();
        for (buffer, place) in buffers.iter_mut().zip(places) {
            buffer.copy_from_slice(&file[place..place + buffer.len()]);
        }
    }
}

/// The kernel as C++, and a `main` that runs it.
fn translate(source: &str) -> String {
    let regex = |text: &str| Regex::new(text).unwrap();
    let text = regex(r"(?m)^(typedef [^;{]*\bu?int(8|16|32|64)_t;|#include .*)$").replace_all(source, "");
    let text = regex(r"extern __shared__ __align__\(\d+\) char (v\d+)\[\];")
        .replace_all(&text, "char* $1 = unit->cube->shared;");
    let line = r#"asm\s*(?:volatile)?\s*\("([^"]*)"\s*:([^:]*):\s*((?:"[^;]*?)?)(?::[^;]*)?\);"#;
    let operand = regex(r#""=?[rlfh]"\(([^()]*)\)"#);
    let operands =
        |text: &str| -> Vec<String> { operand.captures_iter(text).map(|c| c[1].to_string()).collect() };
    let text = regex(line).replace_all(&text, |c: &Captures<'_>| {
        call(&c[1], &operands(&c[2]), &operands(&c[3])).unwrap_or_else(|| panic!("no function for {}", &c[1]))
    });
    let head = regex(r#"extern "C" __global__ void __launch_bounds__\(\d+\)\s+(\w+)\(([^)]*)\)"#);
    let signature = head.captures(&text).unwrap();
    let mut out = format!("#include \"units.h\"\n{text}\nint main(int, char** argv) {{\n");
    out += "char* all = buffers(argv[1]);\nauto number = [&](int i) { return strtoull(argv[i], nullptr, 10); };\n";
    out += "static info_st info;\nint scalars = number(6), first = 7 + scalars;\n";
    out += "for (int i = 0; i < scalars; i++) ((uint32_t*)&info)[i] = number(7 + i);\n";
    out += "Place count = {unsigned(number(2)), unsigned(number(3)), unsigned(number(4))};\n";
    write!(out, "run_cubes(count, number(5), [&] {{ {}(", &signature[1]).unwrap();
    for (i, parameter) in signature[2].split(',').enumerate() {
        let ty = parameter.split('*').next().unwrap().replace("const", "");
        let comma = if i > 0 { ", " } else { "" };
        match ty.trim() {
            "info_st" => write!(out, "{comma}&info"),
            ty => write!(out, "{comma}({ty}*)(all + number(first + {i}))"),
        }
        .unwrap();
    }
    out + "); });\n}\n"
}

/// An assembler line, whose operands are `out` and `from`, as a call.
fn call(line: &str, out: &[String], from: &[String]) -> Option<String> {
    // How many units, or bytes.
    let count = || line.split(", ").skip(1).find_map(|part| part.split(';').next()?.parse::<u32>().ok());
    // What is added to an address.
    let by = line.rsplit_once('+').map_or("0", |(_, digits)| digits.trim_end_matches("];"));
    let (out, all) = (out.join(", "), from.join(", "));
    let first = from.first().map_or("", String::as_str);
    let instruction = line.trim_start_matches(|c: char| !c.is_ascii_alphabetic()).split([' ', ';']).next()?;
    Some(match instruction {
        "reg" if line.contains("cvta.to.shared") => format!("{out} = shared_place({first});"),
        "reg" if line.contains("try_wait") => format!("wait({all});"),
        // A store that never happens.
        "reg" if line.contains("@p st.") => ";".to_string(),
        "mbarrier.init.shared::cta.b64" => format!("begin({first}, {});", count()?),
        "mbarrier.arrive.expect_tx.shared::cta.b64" => format!("arrive({first}, {});", count()?),
        "mbarrier.arrive.shared::cta.b64" => format!("arrive({first}, 0);"),
        "bar.sync" if from.is_empty() => format!("meet(unit->cube->some, {});", count()?),
        "mov.u64" => format!("{out} = (uint64_t){first};"),
        i if i.starts_with("cp.async.bulk") => format!("copy({all}, {});", count()?),
        i if i.starts_with("ld.shared") => format!("load_shared({first} + {by}, {out});"),
        i if i.starts_with("ld.relaxed") => format!("let_others(); load_global({first} + {by}, {out});"),
        i if i.starts_with("ld.global") => format!("load_global((uint64_t){first} + {by}, {out});"),
        i if i.starts_with("st.shared") => format!("store_shared({all});"),
        i if i.starts_with("st.relaxed") => format!("store_global({all}); progress = true;"),
        _ => return None,
    })
}
