// What a CUDA kernel needs to run on a CPU, as C++: every unit of every cube is a fibre of one thread. A unit runs until it
// waits for others; copies to shared memory come some time after they were asked for, and until then their places hold
// rubbish. What a card would not do is an error: addresses that are not aligned, copies beyond shared memory, arrivals that
// nobody expects, cubes that wait for each other for ever.
#pragma once
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

typedef _Float16 __half;

const size_t SHARED = 227 << 10, STACK = 32 << 10;

struct Place { unsigned x, y, z; };
struct Copy { char *to; const char *from; uint32_t bytes, bar; long due; };
// Of the units that have yet to arrive, and the bytes that have yet to come.
struct Barrier { int units = 0, missing = 0; long bytes = 0; uint32_t passed = 0; };
struct Meeting { int here = 0; uint32_t passed = 0; };
struct Plane { uint64_t given[32], taken[32]; Meeting meeting; };
struct Cube;
struct Unit { void *stack; Cube *cube; unsigned place; bool done; };
struct Cube {
    Place place;
    char *shared;
    std::vector<Unit> units;
    std::vector<Plane> planes;
    std::map<uint32_t, Barrier> barriers;
    std::vector<Copy> copies;
    // Of all units, and of some.
    Meeting all, some;
};

static Unit *unit;
static Place cube_count, cube_dim;
static void *scheduler;
static long now;
static bool progress;
static std::function<void()> *body;

[[noreturn]] static void wrong(const char *what) {
    printf("cube %u, unit %u: %s\n", unit->cube->place.x, unit->place, what);
    exit(1);
}

extern "C" void switch_stacks(void **leave, void *enter);
asm(R"(
switch_stacks:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");

static void let_others() { switch_stacks(&unit->stack, scheduler); }

static void meet(Meeting &m, int units) {
    uint32_t passed = m.passed;
    if (++m.here == units) {
        m.here = 0;
        m.passed++;
        progress = true;
    }
    while (m.passed == passed) let_others();
}

// CUDA's words.
#define __device__
#define __global__
#define __restrict__
#define __launch_bounds__(x)
#define threadIdx (Place{unit->place, 0, 0})
#define blockIdx (unit->cube->place)
#define gridDim cube_count
#define blockDim cube_dim
#define warpSize 32u

static unsigned __activemask() { return ~0u; }
static void __syncthreads() { meet(unit->cube->all, unit->cube->units.size()); }

static uint64_t exchange(uint64_t value, unsigned from) {
    Plane &plane = unit->cube->planes[unit->place / 32];
    plane.given[unit->place % 32] = value;
    if (plane.meeting.here == 31) memcpy(plane.taken, plane.given, sizeof plane.taken);
    meet(plane.meeting, 32);
    return plane.taken[from % 32];
}
static void __syncwarp() { exchange(0, 0); }
template <class T> static T shuffle(T value, unsigned from) {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = exchange(bits, from);
    memcpy(&value, &bits, sizeof value);
    return value;
}
template <class T> static T __shfl_sync(unsigned, T value, unsigned from) { return shuffle(value, from); }
template <class T> static T __shfl_xor_sync(unsigned, T value, unsigned by) {
    return shuffle(value, (unit->place % 32) ^ by);
}
static int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 4; i++) sum += int(int8_t(a >> (8 * i))) * int(int8_t(b >> (8 * i)));
    return sum;
}
static float max(float a, float b) { return fmaxf(a, b); }
static float min(float a, float b) { return fminf(a, b); }
template <class T> static T max(T a, T b) { return a > b ? a : b; }
template <class T> static T min(T a, T b) { return a < b ? a : b; }
static float rsqrt(float x) { return 1.0f / sqrtf(x); }

// Instructions.
static uint32_t shared_place(const void *p) {
    long place = (const char *)p - unit->cube->shared;
    if (place < 0 || place >= long(SHARED)) wrong("an address that is not in shared memory");
    return place;
}
static char *shared_at(uint32_t place, size_t bytes) {
    if (place % bytes) wrong("an address in shared memory that is not aligned");
    if (place + bytes > SHARED) wrong("an address beyond shared memory");
    return unit->cube->shared + place;
}
static char *global_at(uint64_t place, size_t bytes) {
    if (place % bytes) wrong("an address that is not aligned");
    return (char *)place;
}
template <class... T> static void load(const char *at, T &...out) {
    ((memcpy(&out, at, sizeof out), at += sizeof out), ...);
}
template <class... T> static void store(char *at, T... values) {
    ((memcpy(at, &values, sizeof values), at += sizeof values), ...);
}
template <class... T> static void load_shared(uint32_t place, T &...out) {
    load(shared_at(place, (sizeof out + ...)), out...);
}
template <class... T> static void load_global(uint64_t place, T &...out) {
    load(global_at(place, (sizeof out + ...)), out...);
}
template <class... T> static void store_shared(uint32_t place, T... values) {
    store(shared_at(place, (sizeof values + ...)), values...);
}
template <class... T> static void store_global(uint64_t place, T... values) {
    store(global_at(place, (sizeof values + ...)), values...);
}
static Barrier &barrier(uint32_t bar) {
    auto found = unit->cube->barriers.find(bar);
    if (found == unit->cube->barriers.end()) wrong("no barrier");
    return found->second;
}
static void begin(uint32_t bar, int units) {
    shared_at(bar, 8);
    Barrier b;
    b.units = b.missing = units;
    unit->cube->barriers[bar] = b;
}
static void look_at(Barrier &b) {
    if (b.missing < 0) wrong("more units arrive than a barrier expects");
    if (b.missing || b.bytes) return;
    b.missing = b.units;
    b.passed++;
    progress = true;
}
static void arrive(uint32_t bar, long bytes) {
    Barrier &b = barrier(bar);
    b.bytes += bytes;
    b.missing--;
    look_at(b);
}
static void wait(uint32_t bar, uint32_t parity) {
    while (barrier(bar).passed % 2 == parity % 2) let_others();
}
static void copy(uint32_t to, uint64_t from, uint32_t bar, uint32_t bytes) {
    if (bytes % 16 || to + bytes > SHARED) wrong("a copy that does not fit");
    char *place = shared_at(to, 16);
    memset(place, 0x7f, bytes);
    unit->cube->copies.push_back({place, global_at(from, 16), bytes, bar, now + 1 + rand() % 4});
    progress = true;
}
static void run_unit() {
    (*body)();
    unit->done = progress = true;
    let_others();
}

static bool come(Cube &cube) {
    bool any = false;
    for (size_t i = 0; i < cube.copies.size();) {
        Copy c = cube.copies[i];
        if (c.due > now) {
            i++;
            continue;
        }
        cube.copies.erase(cube.copies.begin() + i);
        memcpy(c.to, c.from, c.bytes);
        unit = &cube.units[0];
        Barrier &b = barrier(c.bar);
        b.bytes -= c.bytes;
        look_at(b);
        any = true;
    }
    return any;
}

static void run_cubes(Place count, unsigned units, std::function<void()> kernel) {
    cube_count = count;
    cube_dim = {units, 1, 1};
    body = &kernel;
    size_t cubes = size_t(count.x) * count.y * count.z;
    auto room = [](size_t bytes) {
        int how = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        return (char *)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, how, -1, 0);
    };
    char *stacks = room(cubes * units * STACK), *shared = room(cubes * SHARED);
    std::vector<Cube> all(cubes);
    for (size_t i = 0; i < cubes; i++) {
        Cube &cube = all[i];
        cube.place = {unsigned(i % count.x), unsigned(i / count.x % count.y), unsigned(i / count.x / count.y)};
        cube.shared = shared + i * SHARED;
        memset(cube.shared, 0xa5, SHARED);
        cube.planes.resize((units + 31) / 32);
        for (unsigned u = 0; u < units; u++) {
            // As if it had been called, with six registers to be taken back.
            uint64_t *top = (uint64_t *)(stacks + (i * units + u + 1) * STACK) - 1;
            *--top = (uint64_t)run_unit;
            cube.units.push_back({top - 6, &cube, u, false});
        }
    }
    // Who waits for another cube's word looks again and again: that is no progress.
    int idle = 0;
    for (bool left = true; left; now++) {
        bool any = left = false;
        for (Cube &cube : all) {
            any |= come(cube) || !cube.copies.empty();
            for (size_t first = 0; first < units; first += 32) {
                do {
                    progress = false;
                    for (size_t u = first; u < first + 32; u++) {
                        unit = &cube.units[u];
                        if (!unit->done) switch_stacks(&scheduler, unit->stack);
                        left |= !unit->done;
                    }
                    any |= progress;
                } while (progress);
            }
        }
        idle = any ? 0 : idle + 1;
        if (left && idle > 100) {
            printf("all units wait for each other\n");
            exit(1);
        }
    }
}

// The buffers of a kernel, which lie in a file.
static char *buffers(const char *path) {
    int file = open(path, O_RDWR);
    struct stat about;
    if (file < 0 || fstat(file, &about)) {
        perror(path);
        exit(1);
    }
    return (char *)mmap(nullptr, about.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
}
