/** Words of the tuned models: to use, to keep, to take away. */
import type { Words } from './type';

const en = {
  title: 'Tuned models',
  lead: 'What your trainings have made. Each answers wherever its base model does.',
  none: 'No tuned model yet',
  noneText: 'Train one, or bring an adapter that peft has saved.',
  base: 'on {{model}}',
  made: 'made {{when}}',
  offline: 'waits for a GPU',
  chat: 'Chat',
  chatNamed: 'Chat with {{name}}',
  actions: 'What to do with {{name}}',
  further: 'Train it further',
  export: 'Download for peft',
  exportDiffusers: 'Download LoRA for diffusers',
  exportKohya: 'Download LoRA for other tools (kohya)',
  delete: 'Delete',
  deleteTitle: 'Delete {{name}}?',
  deleteText: 'It answers no more, and its adapter and report go for good. Its job and examples stay.',
  deleteYes: 'Delete it',
  import: 'Import an adapter',
  importText:
    'For text a zip of the folder that peft’s save_pretrained wrote: adapter_config.json and adapter_model.safetensors. For pictures a LoRA as one .safetensors file, from diffusers or kohya.',
  importBase: 'Base model that it was made for',
  importFile: 'File',
  importChoose: 'Choose a .zip or .safetensors',
  importYes: 'Import it',
  importSending: 'Uploading · {{percent}}',
  importChecking: 'Checking …',
};

const ko: Words<typeof en> = {
  title: '만든 모델',
  lead: '학습으로 만든 모델입니다. 기본 모델이 답하는 곳이면 어디서나 답합니다.',
  none: '아직 만든 모델이 없습니다',
  noneText: '학습하거나, peft로 저장한 어댑터를 가져오세요.',
  base: '기본 모델 {{model}}',
  made: '{{when}}에 만듦',
  offline: 'GPU를 기다림',
  chat: '대화하기',
  chatNamed: '{{name}} 모델과 대화하기',
  actions: '{{name}} 관리',
  further: '이어서 학습하기',
  export: 'peft용으로 내려받기',
  exportDiffusers: 'diffusers용 LoRA 내려받기',
  exportKohya: '다른 도구용(kohya) LoRA 내려받기',
  delete: '삭제',
  deleteTitle: '{{name}} 모델을 삭제할까요?',
  deleteText: '더는 답하지 않고, 어댑터와 보고서도 사라집니다. 학습 작업과 예시는 남습니다.',
  deleteYes: '삭제하기',
  import: '어댑터 가져오기',
  importText:
    '텍스트 모델은 peft의 save_pretrained가 만든 폴더(adapter_config.json과 adapter_model.safetensors)를 zip으로 묶어 올리세요. 그림 모델은 diffusers나 kohya로 만든 LoRA .safetensors 파일 하나면 됩니다.',
  importBase: '어댑터의 기본 모델',
  importFile: '파일',
  importChoose: '.zip 또는 .safetensors 고르기',
  importYes: '가져오기',
  importSending: '올리는 중 · {{percent}}',
  importChecking: '확인하는 중 …',
};

export const models = { en, ko };
