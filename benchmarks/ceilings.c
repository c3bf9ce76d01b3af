/* How many bit multiply-accumulates a second a core can do at most, by the instructions that runtime/core.c's kernels
   are made of, in registers alone: no loads, no stores, no float arithmetic. Prints one JSON object, in 10^12 a second.

     cc -O2 -o ceilings ceilings.c && ./ceilings

   Eight independent chains, so that throughput counts and not latency; the best of many short stretches, because a
   virtual machine takes some of them away. */
#include <stdio.h>
#include <time.h>

#define TURNS 400000L
#define STRETCHES 25

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

#define EIGHT(step) step(0) step(1) step(2) step(3) step(4) step(5) step(6) step(7)
#define ALL512 "zmm0","zmm1","zmm2","zmm3","zmm4","zmm5","zmm6","zmm7","zmm8","zmm9","zmm10","zmm11","zmm12","zmm13", \
    "zmm14","zmm15","zmm16","zmm17","zmm18","zmm19","zmm20","zmm21","zmm22","zmm23","zmm24","zmm25","zmm26","zmm27", \
    "zmm28","zmm29","zmm30","zmm31"
#define ALL256 "ymm0","ymm1","ymm2","ymm3","ymm4","ymm5","ymm6","ymm7","ymm8","ymm9","ymm10","ymm11","ymm12","ymm13", \
    "ymm14","ymm15"

#define MEASURE(name, bits, body, ...) do { \
    double best = 1e9; \
    for (int stretch = 0; stretch < STRETCHES; stretch++) { \
        double began = now(); \
        for (long turn = 0; turn < TURNS; turn++) __asm__ volatile(body ::: __VA_ARGS__); \
        double took = now() - began; \
        if (took < best) best = took; \
    } \
    printf("%s\"%s\": %.4f", separator, name, (double)(bits) * TURNS / best * 1e-12); \
    separator = ", "; \
} while (0)

/* A row of three taps as a full adder: three words of 512 bits by three xor, one ternary, two popcounts, two sums. */
#define PARITY(i) "vpxord %%zmm8, %%zmm9, %%zmm16\n\tvpxord %%zmm10, %%zmm11, %%zmm17\n\tvpxord %%zmm12, %%zmm13, %%zmm18\n\t" \
    "vpternlogd $0xd4, %%zmm16, %%zmm17, %%zmm18\n\tvpopcntd %%zmm16, %%zmm19\n\tvpopcntb %%zmm18, %%zmm20\n\t" \
    "vpaddd %%zmm19, %%zmm" #i ", %%zmm" #i "\n\tvpdpbusd %%zmm14, %%zmm20, %%zmm" #i "\n\t"
/* The same one word at a time, as 1x1 convolutions have it. */
#define CLASSIC(i) "vpxord %%zmm8, %%zmm9, %%zmm1" #i "\n\tvpopcntd %%zmm1" #i ", %%zmm1" #i "\n\t" \
    "vpaddd %%zmm1" #i ", %%zmm" #i ", %%zmm" #i "\n\t"
/* A table of 16 counts, looked up for 32 nibbles: 128 bits. */
#define TABLE(i) "vpshufb %%ymm8, %%ymm9, %%ymm1" #i "\n\tvpaddb %%ymm1" #i ", %%ymm" #i ", %%ymm" #i "\n\t"
#define TABLES TABLE(0) TABLE(1) TABLE(2) TABLE(3) TABLE(4) TABLE(5)
#define WORD(a, b) "movq %%rbx, %%" a "\n\txorq %%rcx, %%" a "\n\tpopcntq %%" a ", %%" a "\n\taddq %%" a ", %%" b "\n\t"

static const char *separator = "{";

__attribute__((target("avx512f"))) static void avx512(void) {
    MEASURE("avx512 parity", 8 * 3 * 512, EIGHT(PARITY), ALL512);
    MEASURE("avx512 classic", 8 * 512, EIGHT(CLASSIC), ALL512);
}

__attribute__((target("avx2"))) static void avx2(void) { MEASURE("avx2 table", 6 * 128, TABLES, ALL256); }

int main(void) {
    if (__builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512bitalg") &&
        __builtin_cpu_supports("avx512vnni"))
        avx512();
    if (__builtin_cpu_supports("avx2")) avx2();
    if (__builtin_cpu_supports("popcnt"))
        MEASURE("popcnt", 4 * 64, WORD("rax", "r8") WORD("rdx", "r9") WORD("rsi", "r10") WORD("rdi", "r11"),
                "rax", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "cc");
    puts(separator[0] == ',' ? "}" : "{}");
    return 0;
}
