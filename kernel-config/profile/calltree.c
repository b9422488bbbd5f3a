/*
 * QEMU TCG plugin: how many instructions each kernel function took, alone and with what it called.
 *
 * Counts are exact. Call paths are reconstructed from the order of translation blocks: a call pushes a frame that waits
 * for its return address; interrupts and exceptions (asm_*) push one that ends with iret. A switch of kernel threads
 * leaves the old thread's frames on the stack, so a path may start in a thread that it does not belong to; sums per
 * function are right as long as the function does not sleep.
 *
 * Arguments: map=System.map, out=FILE, min=PERCENT of the whole below which a path is not printed.
 * The declarations are those of QEMU's plugin API version 1; the header is not packaged everywhere.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, void (*)(unsigned, void *), int flags, void *);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, void *), void *);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);
size_t qemu_plugin_insn_size(const struct qemu_plugin_insn *);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *);

#define EXPORT __attribute__((visibility("default")))
EXPORT int qemu_plugin_version = 1;

/* --- Symbols ---------------------------------------------------------------------------------- */

struct symbol {
	uint64_t address;
	char *name;
	uint64_t inclusive, self, calls; /* filled in at the end */
	int depth;                       /* >0 while a path through it is being summed: recursion counts once */
};
static struct symbol *symbols;
static int symbol_count;

static int by_address(const void *a, const void *b)
{
	uint64_t x = ((const struct symbol *)a)->address, y = ((const struct symbol *)b)->address;
	return x > y ? 1 : x < y ? -1 : 0;
}

static void load_symbols(const char *path)
{
	FILE *map = fopen(path, "r");
	uint64_t address;
	char type, name[512];

	if (!map) {
		perror(path);
		exit(1);
	}
	while (fscanf(map, "%lx %c %511s", &address, &type, name) == 3) {
		if (!strchr("tTwW", type) || address >> 32 != 0xffffffff)
			continue;
		if (symbol_count && symbols[symbol_count - 1].address == address)
			continue;
		if (!(symbol_count & (symbol_count - 1)))
			symbols = realloc(symbols, (symbol_count ? 2 * symbol_count : 1) * sizeof(*symbols));
		symbols[symbol_count++] = (struct symbol){ .address = address, .name = strdup(name) };
	}
	fclose(map);
	qsort(symbols, symbol_count, sizeof(*symbols), by_address);
}

static int find_symbol(uint64_t pc)
{
	int low = 0, high = symbol_count;

	if (!symbol_count || pc < symbols[0].address || pc > symbols[symbol_count - 1].address + 0x10000)
		return -1;
	while (high - low > 1) {
		int middle = (low + high) / 2;
		if (symbols[middle].address <= pc)
			low = middle;
		else
			high = middle;
	}
	return low;
}

/* --- Call tree -------------------------------------------------------------------------------- */

struct node {
	int symbol;
	struct node *parent, *child, *next;
	uint64_t self, inclusive, calls;
};
struct frame {
	uint64_t return_address;
	struct node *node;
	bool interrupt;
};
#define MAX_DEPTH 4096
#define SEARCH_DEPTH 40 /* how far down a return address is looked for */
static struct node root = { .symbol = -1 };
static struct frame stack[MAX_DEPTH] = { { .node = &root } };
static int top;

static struct node *child_of(struct node *parent, int symbol)
{
	struct node *node;

	for (node = parent->child; node; node = node->next)
		if (node->symbol == symbol)
			return node;
	node = calloc(1, sizeof(*node));
	*node = (struct node){ .symbol = symbol, .parent = parent, .next = parent->child };
	return parent->child = node;
}

static void push(uint64_t return_address, int symbol, bool interrupt)
{
	if (top == MAX_DEPTH - 1)
		return;
	stack[top + 1] = (struct frame){ return_address, child_of(stack[top].node, symbol), interrupt };
	stack[++top].node->calls++;
}

/* --- Execution -------------------------------------------------------------------------------- */

enum ending { OTHER, CALL, IRET };
struct block {
	uint64_t pc, end;
	int instructions, symbol;
	enum ending ending;
	bool function_entry, interrupt_entry;
};
static struct block *previous;

static void follow(const struct block *now)
{
	if (previous->ending == IRET) {
		int i = top;
		while (i > 0 && !stack[i].interrupt)
			i--;
		top = i > 0 ? i - 1 : top;
	} else if (previous->ending == CALL && now->function_entry) {
		push(previous->end, now->symbol, false);
	} else if (now->interrupt_entry) {
		push(0, now->symbol, true);
	} else if (now->pc != previous->end) {
		for (int i = top; i > 0 && i > top - SEARCH_DEPTH; i--)
			if (stack[i].return_address == now->pc) {
				top = i - 1;
				return;
			}
		if (now->function_entry && top > 0 && now->symbol != stack[top].node->symbol) { /* a tail call */
			stack[top].node = child_of(stack[top - 1].node, now->symbol);
			stack[top].node->calls++;
		}
	}
}

static void on_execution(unsigned cpu, void *block)
{
	if (previous)
		follow(block);
	previous = block;
	stack[top].node->self += previous->instructions;
}

static enum ending classify(const uint8_t *code, size_t size)
{
	size_t i = 0;

	while (i < size && (code[i] == 0x2e || code[i] == 0x3e || code[i] == 0x66 || (code[i] & 0xf0) == 0x40))
		i++; /* prefixes */
	if (size - i >= 5 && code[i] == 0xe8)
		return CALL;
	if (i + 1 < size && code[i] == 0xff && ((code[i + 1] >> 3) & 7) == 2)
		return CALL;
	return i < size && code[i] == 0xcf ? IRET : OTHER;
}

static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
	size_t count = qemu_plugin_tb_n_insns(tb);
	struct qemu_plugin_insn *last = qemu_plugin_tb_get_insn(tb, count - 1);
	struct block *block = calloc(1, sizeof(*block));

	block->pc = qemu_plugin_tb_vaddr(tb);
	block->instructions = count;
	block->end = qemu_plugin_insn_vaddr(last) + qemu_plugin_insn_size(last);
	block->ending = classify(qemu_plugin_insn_data(last), qemu_plugin_insn_size(last));
	block->symbol = find_symbol(block->pc);
	if (block->symbol >= 0 && symbols[block->symbol].address == block->pc) {
		const char *name = symbols[block->symbol].name;
		block->function_entry = true;
		block->interrupt_entry = !strncmp(name, "asm_", 4) || !strcmp(name, "entry_SYSCALL_64");
	}
	qemu_plugin_register_vcpu_tb_exec_cb(tb, on_execution, 0, block);
}

/* --- Report ----------------------------------------------------------------------------------- */

static const char *output = "calltree.out";
static double threshold = 0.2;

static uint64_t sum(struct node *node)
{
	node->inclusive = node->self;
	for (struct node *child = node->child; child; child = child->next)
		node->inclusive += sum(child);
	return node->inclusive;
}

static void add_to_symbols(const struct node *node)
{
	struct symbol *symbol = node->symbol >= 0 ? &symbols[node->symbol] : NULL;

	if (symbol) {
		symbol->inclusive += symbol->depth ? 0 : node->inclusive;
		symbol->self += node->self;
		symbol->calls += node->calls;
		symbol->depth++;
	}
	for (const struct node *child = node->child; child; child = child->next)
		add_to_symbols(child);
	if (symbol)
		symbol->depth--;
}

static int by_inclusive(const void *a, const void *b)
{
	uint64_t x = ((const struct symbol *)a)->inclusive, y = ((const struct symbol *)b)->inclusive;
	return x < y ? 1 : x > y ? -1 : 0;
}

static void print_tree(FILE *file, struct node *node, int depth)
{
	fprintf(file, "%*s%.3f (%.3f) %s x%lu\n", depth, "", node->inclusive / 1e6, node->self / 1e6,
		node->symbol < 0 ? "all" : symbols[node->symbol].name, node->calls);
	for (;;) {
		struct node *largest = NULL;
		for (struct node *child = node->child; child; child = child->next)
			if (child->inclusive && (!largest || child->inclusive > largest->inclusive))
				largest = child;
		if (!largest || largest->inclusive * 100.0 < threshold * root.inclusive)
			return;
		print_tree(file, largest, depth + 1);
		largest->inclusive = 0; /* printed */
	}
}

static void on_exit_of_qemu(qemu_plugin_id_t id, void *unused)
{
	FILE *file = fopen(output, "w");

	if (!file) {
		perror(output);
		return;
	}
	sum(&root);
	add_to_symbols(&root);
	fprintf(file, "total %.3f\n\n# million instructions: path with callees (alone) function xcalls\n", root.inclusive / 1e6);
	uint64_t all = root.inclusive;
	print_tree(file, &root, 0);
	root.inclusive = all;
	qsort(symbols, symbol_count, sizeof(*symbols), by_inclusive);
	fprintf(file, "\n# million instructions: with callees, alone, calls, function\n");
	for (int i = 0; i < symbol_count && symbols[i].inclusive * 100.0 >= threshold * all; i++)
		fprintf(file, "F %9.3f %9.3f %9lu %s\n", symbols[i].inclusive / 1e6, symbols[i].self / 1e6, symbols[i].calls,
			symbols[i].name);
	fclose(file);
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const void *info, int argc, char **argv)
{
	for (int i = 0; i < argc; i++) {
		if (!strncmp(argv[i], "map=", 4))
			load_symbols(argv[i] + 4);
		else if (!strncmp(argv[i], "out=", 4))
			output = strdup(argv[i] + 4);
		else if (!strncmp(argv[i], "min=", 4))
			threshold = atof(argv[i] + 4);
	}
	qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
	qemu_plugin_register_atexit_cb(id, on_exit_of_qemu, NULL);
	return 0;
}
