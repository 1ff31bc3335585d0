"One thread for each pytest worker, and no network: what a test downloads is not a test."
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('MPLBACKEND', 'agg')
os.environ['TQDM_DISABLE'] = os.environ['HF_HUB_OFFLINE'] = os.environ['HF_DATASETS_OFFLINE'] = '1'
