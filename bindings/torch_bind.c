/* The one place that knows PyTorch: registers every operator of the catalogue and carries a call
 * from PyTorch's stack to the core and back. It names no operator. Compiled with -fexceptions: an
 * error leaves as a C++ exception that aoti_torch_check() throws, after every handle has been
 * freed. */
#define _GNU_SOURCE
#include "torch_bind.h"

#include <ctype.h>
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "core/bind.h"
#include "core/memory.h"
#include "core/run.h"
#include "core/threads.h"
#include "torch_shim.h"

static const int32_t TORCH_DTYPE[SK_DT_OTHER] = SK_TORCH_DTYPES;
static const struct { uint8_t code, bits; } TORCH_SCALAR[] = SK_TORCH_SCALARS;

/* ---- a call ---- */

typedef struct frame {
    sk_call call;
    AtenTensorHandle handle[SK_MAX_ITEMS];                                        /* owned */
    int64_t shape[SK_MAX_ITEMS][SK_MAX_RANK], strides[SK_MAX_ITEMS][SK_MAX_RANK]; /* outputs' */
} frame;

static void free_handles(const frame *f) {
    for (int i = 0; i < f->call.op->count; i++)
        if (f->handle[i]) sk_torch.aoti_torch_delete_tensor_object(f->handle[i]);
}

/* Fills the descriptor of an input. Shape and strides stay PyTorch's. */
static void describe(frame *f, int i) {
    selfkd_tensor *const t = &f->call.tensor[i];
    const AtenTensorHandle h = f->handle[i];
    int64_t ndim = 0;
    int32_t dtype = -1, device = -1;
    sk_torch.aoti_torch_get_dim(h, &ndim);
    sk_torch.aoti_torch_get_sizes(h, &t->shape);
    sk_torch.aoti_torch_get_strides(h, &t->strides);
    sk_torch.aoti_torch_get_dtype(h, &dtype);
    sk_torch.aoti_torch_get_device_type(h, &device);
    sk_torch.aoti_torch_get_device_index(h, &t->device.device_id);
    sk_torch.aoti_torch_get_data_ptr(h, &t->data);
    t->ndim = (int32_t)ndim;
    t->device.device_type = device == SK_TORCH_CPU    ? SELFKD_CPU
                            : device == SK_TORCH_CUDA ? SELFKD_CUDA
                                                      : -device;
    t->dtype = (selfkd_dtype){255, 0, 1};
    if (dtype >= 0 && dtype < (int32_t)(sizeof TORCH_SCALAR / sizeof *TORCH_SCALAR))
        t->dtype = (selfkd_dtype){TORCH_SCALAR[dtype].code, TORCH_SCALAR[dtype].bits, 1};
}

/* Takes the arguments from the stack, in the schema's order. The handles are ours from here on. */
static void unpack(frame *f, const StableIValue *stack) {
    for (int i = 0; i < f->call.op->count; i++) {
        const int kind = f->call.op->items[i].kind;
        f->handle[i] = NULL;
        if (kind >= SK_REAL) {
            memcpy(&f->call.number[i], stack++, sizeof *stack);
        } else if (sk_is_input(&f->call.op->items[i])) {
            memcpy(&f->handle[i], stack++, sizeof *stack);
            const bool given = kind != SK_OPT || (*stack++ & 1);
            f->call.tensor[i] = (selfkd_tensor){.ndim = SK_ABSENT};
            if (given) describe(f, i);
        }
    }
}

/* Fresh memory costs a page fault every 4 KB; large outputs ask for 2 MB pages. */
static void ask_for_huge_pages(void *data, int64_t bytes) {
    const uintptr_t page = (uintptr_t)2 << 20, begin = ((uintptr_t)data + page - 1) & ~(page - 1);
    const uintptr_t end = ((uintptr_t)data + (uintptr_t)bytes) & ~(page - 1);
    if (bytes > 2 * (int64_t)page && end > begin)
        madvise((void *)begin, end - begin, MADV_HUGEPAGE);
}

/* Makes an output or a work space like `t`, whose data it leaves. */
static int new_tensor(frame *f, int i, int32_t dtype, selfkd_tensor *t) {
    const int32_t type = t->device.device_type == SELFKD_CPU ? SK_TORCH_CPU : SK_TORCH_CUDA;
    if (sk_torch.aoti_torch_empty_strided(t->ndim, t->shape, t->strides, dtype, type,
                                          t->device.device_id, &f->handle[i]))
        return sk_fail(SELFKD_ERROR_MEMORY, "%s: no memory for %s", f->call.op->name,
                       f->call.op->items[i].name);
    sk_torch.aoti_torch_get_data_ptr(f->handle[i], &t->data);
    return SELFKD_OK;
}

static int allocate_output(frame *f, int i) {
    selfkd_tensor *const t = &f->call.tensor[i];
    *t = (selfkd_tensor){.shape = f->shape[i], .strides = f->strides[i]};
    sk_output_like(&f->call, i, t);
    const enum sk_dtype dtype = sk_dtype_of(t->dtype);
    const int status = new_tensor(f, i, TORCH_DTYPE[dtype], t);
    if (status) return status;
    int64_t bytes = sk_dtype_size(dtype);
    for (int k = 0; k < t->ndim; k++) bytes *= t->shape[k];
    if (t->device.device_type == SELFKD_CPU) ask_for_huge_pages(t->data, bytes);
    return sk_bind(&f->call, i);
}

/* On the CPU the core has a work space of its own. */
static int allocate_scratch(frame *f, int i) {
    int64_t bytes = f->call.op->items[i].bytes, stride = 1;
    selfkd_tensor t = {
        .device = sk_device_of(&f->call), .ndim = 1, .shape = &bytes, .strides = &stride};
    if (t.device.device_type == SELFKD_CPU) return SELFKD_OK;
    const int status = new_tensor(f, i, SK_TORCH_UINT8, &t);
    sk_arg_of(&f->call, i)->data = t.data;
    return status;
}

static int run(frame *f, StableIValue *stack) {
    const sk_op *const op = f->call.op;
    int status = sk_check(&f->call);
    for (int i = 0; i < op->count && !status; i++) {
        if (sk_is_output(&op->items[i])) status = allocate_output(f, i);
        if (op->items[i].kind == SK_SCRATCH) status = allocate_scratch(f, i);
    }
    if (status) return status;
    void *stream = NULL;
    const selfkd_device device = sk_device_of(&f->call);
    if (device.device_type == SELFKD_CUDA && sk_torch.aoti_torch_get_current_cuda_stream)
        sk_torch.aoti_torch_get_current_cuda_stream(device.device_id, &stream);
    status = sk_run(&f->call, stream);
    for (int i = 0; i < op->count && !status; i++) {
        if (!sk_is_output(&op->items[i])) continue;
        memcpy(stack++, &f->handle[i], sizeof *stack); /* PyTorch owns it now */
        f->handle[i] = NULL;
    }
    return status;
}

/* The one place that raises. */
static void raise_message(const char *op) {
    sk_torch.aoti_torch_check(false, op, "selfkd", 0, selfkd_message());
}

void sk_call_from_torch(const sk_op *op, uint64_t *stack) {
    frame f;
    f.call.op = op;
    unpack(&f, stack);
    const int status = run(&f, stack);
    free_handles(&f);
    if (status) raise_message(op->name);
}

void sk_guard_from_torch(const sk_op *op, uint64_t *stack) {
    if (!sk_torch.aoti_torch_grad_mode_is_enabled()) {
        sk_call_from_torch(op, stack);
        return;
    }
    frame f;
    f.call.op = op;
    unpack(&f, stack);
    free_handles(&f);
    char backward[128];
    snprintf(backward, sizeof backward, "%s_backward", op->name);
    const bool exists = sk_find(backward) != NULL;
    sk_fail(SELFKD_ERROR_VALUE,
            "selfkd: %s has no gradient until `import selfkd` registers it; import the package, or "
            "call under torch.no_grad()%s%s",
            op->name, exists ? " and use " : "", exists ? backward : "");
    raise_message(op->name);
}

/* ---- registration ---- */

enum { CPU, CUDA, AUTOGRAD, KEYS };
static const char *const KEY[KEYS] = {"CPU", "CUDA", "Autograd"};
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char registered[64] = ""; /* the namespace */
static TorchLibraryHandle catalogue, back_end[KEYS];
static char state[1024] = "not asked yet";

const char *selfkd_torch(void) { return state; }
const char *selfkd_torch_namespace(void) { return registered[0] ? registered : NULL; }

/* "op(Tensor u, Tensor weight, bool has_weight, float T) -> (Tensor loss, ...)" */
static void write_schema(const sk_op *op, char *text, size_t room) {
    static const char *const type[] = {[SK_REAL] = "float",
                                       [SK_INT] = "int",
                                       [SK_BOOL] = "bool",
                                       [SK_CHOICE] = "int",
                                       [SK_RESIZE] = "int"};
    size_t n = (size_t)snprintf(text, room, "%s(", op->name);
    const char *comma = "";
    char alias = 'a';
    for (int i = 0; i < op->count; i++) {
        const sk_item *const it = &op->items[i];
        if (!sk_is_input(it) && it->kind < SK_REAL) continue;
        const char *const of = it->kind >= SK_REAL ? type[it->kind] : "Tensor";
        n += (size_t)snprintf(text + n, room - n, "%s%s", comma, of);
        if (it->kind == SK_INOUT) n += (size_t)snprintf(text + n, room - n, "(%c!)", alias++);
        n += (size_t)snprintf(text + n, room - n, " %s", it->name);
        if (it->kind == SK_OPT)
            n += (size_t)snprintf(text + n, room - n, ", bool has_%s", it->name);
        comma = ", ";
    }
    n += (size_t)snprintf(text + n, room - n, ") -> (");
    comma = "";
    for (int i = 0; i < op->count; i++) {
        if (!sk_is_output(&op->items[i])) continue;
        n += (size_t)snprintf(text + n, room - n, "%sTensor %s", comma, op->items[i].name);
        comma = ", ";
    }
    snprintf(text + n, room - n, ")");
}

static AOTITorchError define(TorchLibraryHandle library, const char *schema) {
    if (!sk_torch.torch_library_def_with_tags || !sk_torch.torch_tag_pt2_compliant_tag)
        return sk_torch.aoti_torch_library_def(library, schema);
    const int32_t tag = sk_torch.torch_tag_pt2_compliant_tag();
    return sk_torch.torch_library_def_with_tags(library, schema, &tag, 1);
}

/* The file of another copy of this library that has registered the namespace, or NULL. */
static const char *other_copy(const char *namespace) {
    void *const self = dlopen(NULL, RTLD_LAZY);
    struct link_map *map = NULL;
    if (!self || dlinfo(self, RTLD_DI_LINKMAP, &map)) return NULL;
    for (; map; map = map->l_next) {
        void *const library = map->l_name[0] ? dlopen(map->l_name, RTLD_NOLOAD | RTLD_LAZY) : NULL;
        void *const found = library ? dlsym(library, "selfkd_torch_namespace") : NULL;
        if (library) dlclose(library);
        const char *(*ask)(void);
        memcpy(&ask, &found, sizeof found);
        const char *const its = ask && ask != selfkd_torch_namespace ? ask() : NULL;
        if (its && strcmp(its, namespace) == 0) return map->l_name;
    }
    return NULL;
}

static const char *own_file(void) {
    Dl_info info;
    return dladdr((void *)state, &info) && info.dli_fname ? info.dli_fname : "this library";
}

/* Whether the text is an identifier that PyTorch does not use itself. */
static bool is_namespace(const char *text) {
    if (!text || !text[0] || isdigit((unsigned char)text[0]) || strlen(text) >= sizeof registered)
        return false;
    for (const char *c = text; *c; c++)
        if (!isalnum((unsigned char)*c) && *c != '_') return false;
    return strcmp(text, "_") != 0 && strcmp(text, "aten") != 0 && strcmp(text, "prim") != 0;
}

static void take_back(TorchLibraryHandle *handle) {
    if (*handle) sk_torch.aoti_torch_delete_library_object(*handle);
    *handle = NULL;
}

static void unregister_all(void) {
    for (int k = KEYS; k-- > 0;) take_back(&back_end[k]);
    take_back(&catalogue);
    registered[0] = '\0';
}

static bool register_all(const char *namespace) {
    AOTITorchError error =
        sk_torch.aoti_torch_library_init_fragment(namespace, __FILE__, __LINE__, &catalogue);
    for (int k = 0; k < KEYS && !error; k++)
        error = sk_torch.aoti_torch_library_init_impl(namespace, KEY[k], __FILE__, __LINE__,
                                                      &back_end[k]);
    for (int i = 0; sk_ops[i] && !error; i++) {
        char schema[2048];
        write_schema(sk_ops[i], schema, sizeof schema);
        error = define(catalogue, schema);
        for (int k = 0; k < KEYS && !error; k++)
            error = sk_torch.aoti_torch_library_impl(
                back_end[k], sk_ops[i]->name,
                k == AUTOGRAD ? sk_ops[i]->torch_guard : sk_ops[i]->torch);
    }
    if (error)
        unregister_all();
    else
        strcpy(registered, namespace);
    return !error;
}

/* Whether operators may be held: by a package, which takes the guard away, or by who called one. */
static bool is_used(void) {
    for (int i = 0; sk_ops[i]; i++)
        if (*sk_ops[i]->calls) return true;
    return !back_end[AUTOGRAD];
}

static bool say(bool result, const char *format, ...) __attribute__((format(printf, 2, 3)));
static bool say(bool result, const char *format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(state, sizeof state, format, values);
    va_end(values);
    return result;
}

static bool registers(const char *namespace) {
    if (!is_namespace(namespace))
        return say(false,
                   "namespace is %.99s, expected an identifier of less than %d characters that is"
                   " none of PyTorch's own (aten, prim, _)",
                   namespace ? namespace : "NULL", (int)sizeof registered);
    if (strcmp(registered, namespace) != 0) {
        if (registered[0] && is_used())
            return say(false, "registered as %s and in use; a copy of %s can be registered as %s",
                       registered, own_file(), namespace);
        const char *const missing = sk_find_torch();
        if (missing) return say(false, "%s", missing);
        const char *const other = other_copy(namespace);
        if (other)
            return say(false, "%s is registered by another copy, %s; %s registers nothing",
                       namespace, other, own_file());
        unregister_all();
        if (!register_all(namespace))
            return say(false, "PyTorch refused the registration (it printed why)");
        sk_use_parallel_for(sk_torch.torch_parallel_for);
    }
    return say(true, "registered; threads: %s",
               sk_torch.torch_parallel_for ? "PyTorch's" : "selfkd's own pool");
}

int selfkd_register_torch(const char *namespace) {
    pthread_mutex_lock(&lock);
    const bool result = registers(namespace);
    pthread_mutex_unlock(&lock);
    return result;
}

void selfkd_release_autograd_guard(void) {
    pthread_mutex_lock(&lock);
    take_back(&back_end[AUTOGRAD]);
    pthread_mutex_unlock(&lock);
}

__attribute__((constructor)) static void at_load(void) { selfkd_register_torch("selfkd"); }
