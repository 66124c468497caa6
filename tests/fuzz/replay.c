/* Replays a corpus without libFuzzer: replay FILE, a line of hexadecimal bytes for each input. With
 * a second file, inputs are written to it one by one before they run: the last is what failed. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"
#include "selfkd.h"

static void replay(const char *line, const char *name) {
    const size_t size = strlen(line) / 2;
    uint8_t *const data = malloc(size ? size : 1); /* exactly, for AddressSanitizer */
    for (size_t k = 0; k < size; k++) {
        const char digits[3] = {line[2 * k], line[2 * k + 1], 0};
        data[k] = (uint8_t)strtoul(digits, NULL, 16);
    }
    FILE *const last = name ? fopen(name, "w") : NULL;
    if (last) {
        fprintf(last, "%s\n", line);
        fclose(last);
    }
    LLVMFuzzerTestOneInput(data, size);
    free(data);
}

/* Every single fault in every argument of every operator, in calls that are otherwise right; bytes
 * as decode() takes them. */
static void every_fault(void) {
    static const uint8_t small[] = {0, 1, 2, 4, 255}, large[] = {0x7f, 0x80, 0x20};
    for (int op = 0; sk_ops[op]; op++)
        for (int at = 0; at < 20 * sk_ops[op]->count * 4; at++)
            for (int value = 0; value < 8; value++)
                for (int rest = 0; rest < 2; rest++) {
                    uint8_t data[96];
                    const int kind = at % 20, item = at / 20 % sk_ops[op]->count;
                    const int dimension = at / 20 / sk_ops[op]->count;
                    if (dimension > 0 && (kind < 4 || kind > 7)) continue; /* has none */
                    const bool is_large = value >= 5;
                    int n = 0;
                    memset(data, rest, sizeof data);
                    data[n++] = (uint8_t)op;
                    data[n++] = 1;
                    data[n++] =
                        (uint8_t)(kind + (is_large ? 140 : 0)); /* 140 is a multiple of 20 */
                    data[n++] = (uint8_t)item;
                    data[n++] = (uint8_t)dimension;
                    data[n++] = is_large ? 0 : small[value];
                    if (is_large) data[n] = large[value - 5], n += 8;
                    data[n++] = (uint8_t)(2 + rest); /* dtype */
                    for (int k = 0; k < 16; k++) data[n + k] = (uint8_t)(k < 5 ? 2 : 3 + rest);
                    n += 5 + 4 + 4;
                    for (int k = n; k < 96; k++) data[k] = (uint8_t)rest;
                    LLVMFuzzerTestOneInput(data, sizeof data);
                }
}

int main(int count, char **file) {
    static char line[1 << 16];
    FILE *const corpus = count > 1 ? fopen(file[1], "r") : NULL;
    if (!corpus) return fprintf(stderr, "replay FILE\n"), 1;
    while (fgets(line, sizeof line, corpus)) {
        line[strcspn(line, "\n")] = 0;
        replay(line, count > 2 ? file[2] : NULL);
    }
    fclose(corpus);
    if (count > 2) remove(file[2]);
    printf("corpus: %ld calls, %ld reached a kernel\n", inputs, reached);
    every_fault();
    for (int i = 0; sk_ops[i]; i++)
        printf("%6lld %s\n", (long long)selfkd_call_count(sk_ops[i]->name), sk_ops[i]->name);
    printf("with every single fault: %ld calls\n", inputs);
    return 0;
}
