/* The part of libbitsandbytes 0.50's C interface that granite uses, written from what its Python side passes.
 * Plain C types and no #include, so that libclang needs no headers of its own. A bf16 is passed as unsigned short,
 * a cudaStream_t as void* (null is the legacy default stream). */

/* libbitsandbytes_cpu.so. Dequantisers take m * n values; absmax holds one scale per block of n values of a row. */
void cquantize_blockwise_cpu_fp32(float *code, float *a, float *absmax, unsigned char *out, long long blocksize, long long n);
void cdequantize_blockwise_cpu_fp32(float *code, unsigned char *a, const float *absmax, float *out, long long blocksize, long long n);
void cdequantize_blockwise_cpu_nf4_fp32(unsigned char *a, const float *absmax, float *out, long long blocksize, long long m, long long n);
void cdequantize_blockwise_cpu_nf4_bf16(unsigned char *a, const float *absmax, unsigned short *out, long long blocksize, long long m, long long n);

/* libbitsandbytes_cuda130.so. The quantisers take no stream: they run on the legacy default stream. On a CUDA error
 * the library prints a line and calls exit(1). */
void cquantize_blockwise_fp32_nf4(float *code, float *a, float *absmax, unsigned char *out, int blocksize, int n);
void cquantize_blockwise_bf16_nf4(float *code, unsigned short *a, float *absmax, unsigned char *out, int blocksize, int n);
void cdequantize_blockwise_fp32_nf4(float *code, unsigned char *a, float *absmax, float *out, int blocksize, int n, void *stream);
void cdequantize_blockwise_bf16_nf4(float *code, unsigned char *a, float *absmax, unsigned short *out, int blocksize, int n, void *stream);
void cquantize_blockwise_fp32(float *code, float *a, float *absmax, unsigned char *out, int blocksize, int n);
void cdequantize_blockwise_fp32(float *code, unsigned char *a, float *absmax, float *out, int blocksize, int n, void *stream);
